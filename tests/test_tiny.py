"""The tiny model: it half knows the world, can use a reference, is an ordinary checkpoint, and its script still works."""

import pytest
import torch

from engine.loading import load
from engine.metrics import measure
from tasks import tiny, world
from tasks.data import Example


@pytest.fixture
def lm(tiny):
    return tiny


@pytest.mark.slow
def test_the_base_half_knows_the_world_and_can_use_a_reference(lm):
    task = world.load(5, 30)
    alone, helped = measure(lm, task, task.test), measure(lm, task, task.test, with_reference=True)
    assert 30 <= alone["accuracy"] <= 50 and max(alone["by_task"].values()) <= 75
    assert 78 <= helped["accuracy"] <= 97
    misled = [Example(e.task, e.question, e.negative, answer=e.answer) for e in task.test]
    wrong = measure(lm, task, misled, with_reference=True)["by_task"]
    for family in ("choice", "fact"):  # elsewhere a wrong reference still has right parts (an argument, an operation)
        assert wrong[family] < alone["by_task"][family] - 5 and wrong[family] > 0


def test_it_is_an_ordinary_small_checkpoint(lm):
    files = {p.name: p.stat().st_size for p in tiny.ASSET.iterdir()}
    assert sum(files.values()) < 4_000_000 and "model.safetensors" in files
    assert type(lm.model).__name__ == "Qwen2ForCausalLM" and lm.vocab <= lm.model.config.vocab_size
    tok = lm.tokenizer
    ids = tok.apply_chat_template(
        [{"role": "user", "content": "47+38"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert tok.decode(ids["input_ids"]) == "<|im_start|>user\n47+38<|im_end|>\n<|im_start|>assistant\n"
    strange = "Grüße 漢字 \t x = 3.5\n\nok"
    assert tok.decode(tok(strange)["input_ids"]) == strange  # any text can be encoded


@pytest.mark.slow
def test_the_script_still_works(tmp_path, capsys):
    tiny.main(["--out", str(tmp_path / "m"), "--steps", "12", "--hidden", "64", "--layers", "1"])
    small = load(str(tmp_path / "m"), torch.device("cpu"))
    assert small.vocab == len(tiny.make_tokenizer()) and "parameters" in capsys.readouterr().out
    losses = tiny.pretrain(small.model, small.tokenizer, steps=15, batch=32)
    assert sum(losses[-3:]) < sum(losses[:3])
