"""The real path without a download: a Qwen2 with a larger embedding table than tokenizer, and records of the benchmarks' schema."""

import json
from pathlib import Path

import pytest
import torch
from conftest import steps_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from engine.config import make
from engine.loading import load
from engine.pretrained import SHORT, TINY
from tasks import benchmarks

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parent / "fixtures"
FAST = dict(preset="real", epochs=0.0, steps=2, batch=3, micro_batch=2, max_new_tokens=12, max_prompt_tokens=1800)
FAST |= dict(teacher_every=0, save_every=1)


@pytest.fixture(autouse=True)
def offline_rows(monkeypatch):
    read = lambda name: [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text().splitlines()]
    monkeypatch.setattr(benchmarks, "_rows", lambda benchmark, side: read(benchmark.name))


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """The tiny model with 64 embedding rows too many (Qwen2.5-0.5B has 271), two end ids, and a hub's sampling defaults."""
    folder = tmp_path_factory.mktemp("m") / "shaped"
    model = AutoModelForCausalLM.from_pretrained(TINY)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer) + 64)
    model.config.max_position_embeddings = 2048
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 0]
    model.generation_config.update(top_p=0.8, top_k=20, repetition_penalty=1.1, do_sample=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_padded_table_loads_and_ends_are_all_there(shaped):
    lm = load(shaped, CPU)
    assert lm.model.get_input_embeddings().weight.shape[0] == lm.vocab + 64 and len(lm.eos) == 2


@pytest.mark.parametrize(
    ("data", "recipe", "more"),
    [
        ("scienceqa", "unisd-star", dict(context_kind="retrieval")),
        pytest.param("cos_e", "agree-seq", dict(context_kind="induction", context_reference=False), marks=pytest.mark.slow),
        pytest.param("mbpp", "contrast", dict(negatives="model"), marks=pytest.mark.slow),
        pytest.param("toolalpaca", "gkd", {}, marks=pytest.mark.slow),
        pytest.param("gsm8k", "unisd-star", dict(lora_rank=4, divergence="reverse", estimator="sampled"), marks=pytest.mark.slow),
        pytest.param("medmcqa", "sft", dict(grad_checkpointing=True), marks=pytest.mark.slow),
    ],
)
def test_a_benchmark_trains_end_to_end(data, recipe, more, shaped, tmp_path, no_picture):
    if "lora_rank" in more:
        pytest.importorskip("peft")
    summary = train.main(make(recipe, model=shaped, data=data, out=str(tmp_path), **(FAST | dict(contexts=2, ema_every=1) | more)))
    assert summary["steps"] == 2 and summary["model"] == shaped
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["data"] == data and manifest["fingerprint"] == summary["data"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    if data in ("scienceqa", "mbpp"):
        assert set(summary["ood"]["after"]["by_task"]) == {"gpqa" if data == "scienceqa" else "humaneval"}
    saved = json.loads((tmp_path / "generation_config.json").read_text()) if not more.get("lora_rank") else {"top_k": 20}
    assert saved["top_k"] == 20  # the hub's own defaults are given back, not overwritten by ours
    again = load(str(tmp_path), CPU)
    assert again.vocab + 64 == again.model.get_input_embeddings().weight.shape[0]


def test_the_padding_rows_never_move(shaped, tmp_path):
    run, _ = steps_of(tmp_path, "sd", model=shaped, data="gsm8k", **(FAST | dict(weight_decay=0.0, lr=1e-2)))
    before, after = (m.get_input_embeddings().weight for m in (load(shaped, CPU).model, run.lm.model))
    n = load(shaped, CPU).vocab
    assert torch.equal(before[n:], after[n:]) and not torch.equal(before[:n], after[:n])


def test_every_recipe_gets_the_same_examples_in_the_same_order():
    a = benchmarks.load_task("scienceqa", seed=3, negatives=True)[0]
    b = benchmarks.load_task("scienceqa", seed=3, negatives=False)[0]
    assert [e.question for e in a.train] == [e.question for e in b.train]


def test_short_names_are_the_instruct_models():
    assert SHORT["Qwen2.5-0.5B"] == "Qwen/Qwen2.5-0.5B-Instruct" and SHORT["Llama-3.1-8B"] == "meta-llama/Llama-3.1-8B-Instruct"
    assert SHORT["gemma-3-4b"] == "google/gemma-3-4b-it" and {"Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B"} <= set(SHORT)


def test_privileged_is_the_ceiling_as_a_row(shaped, tmp_path):
    cfg = make("privileged", model=shaped, data="gsm8k", out=str(tmp_path), **(FAST | dict(steps=0)))
    summary = train.main(cfg)
    assert summary["after"]["accuracy"] == summary["ceiling"]["accuracy"]
