"""The same work in TRL: the teacher that is put into its GKDTrainer reads as ours does, and without TRL there is one line."""

import importlib.util
import json

import pytest
import torch

from engine.config import make
from engine.rollout import right_pad
from experiments import peers
from tasks import world
from tasks.data import chat_ids, teacher_message
from unisd import read


def test_the_reference_is_put_in_and_the_logits_come_back_in_place(tiny):
    task, encode = world.load(20, 1), tiny.tokenizer
    student = [chat_ids(encode, e.question) for e in task.train]
    teacher = [chat_ids(encode, teacher_message(task.wording, e.question, e.reference)) for e in task.train]
    said = [encode(e.demo, add_special_tokens=False)["input_ids"] for e in task.train]
    with torch.no_grad():
        reader = peers.WithReference(tiny.model, dict(zip(map(tuple, student), teacher, strict=True)))
        logits = reader(*right_pad([p + s for p, s in zip(student, said, strict=True)], "cpu")).logits
        expected = tiny.model.get_output_embeddings()(read(tiny.model, teacher, *right_pad(said, "cpu")))
    found = [row[len(p) - 1 : len(p) - 1 + len(s)] for row, p, s in zip(logits, student, said, strict=True)]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)


def test_without_trl_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        peers.main([])
    assert (
        stop.value.code == 2 and capsys.readouterr().err == "peers.py: TRL is not installed: pip install --no-deps trl accelerate\n"
    )


def test_the_tables():
    row = {"recipe": "sd", "seed": 0, "step_seconds": 0.2, "mib": 300.0, "accuracy": 90.0, "jsd": 0.03}
    rows = [row | {"side": "ours"}, row | {"side": "trl", "step_seconds": 0.4, "accuracy": 92.0}]
    rows += [r | {"seed": 1, "accuracy": r["accuracy"] + 1} for r in rows]
    assert "| sd | ours | 0.200, 0.200 | 0.50 | 300 |" in peers.table(rows, timed=True)
    assert "| sd | TRL's SDFTTrainer | 92.5 ± 6.4 | 0.0300 ± 0.0000 |" in peers.table(rows, timed=False)
    rows = [row | {"recipe": "gkd", "side": side, "seed": seed} for seed in (0, 1) for side in ("ours", "trl", "trl-own")]
    assert "| gkd | the same, divided by its own tokens | 90.0 ± 0.0 | 0.0300 ± 0.0000 |" in peers.table(rows, timed=False)


@pytest.mark.slow
def test_what_eval_says_is_read(tmp_path, tiny):
    tiny.save(tmp_path)
    found = peers.measured(tmp_path, make("sd"), size=2)
    assert 0 <= found["accuracy"] <= 100 and found["jsd"] < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="TRL is not installed")
@pytest.mark.parametrize(("side", "recipe"), [(side, recipe) for recipe, sides in peers.PAIRS.items() for side in sides])
def test_three_steps_in_trl(side, recipe, tmp_path):
    cost = peers.start(side, recipe, 0, ["--steps", "3"], tmp_path)
    assert len(cost["seconds"]) == 3 and (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2"
