"""The command: its table, its files, several tasks at once, and what it says when one cannot be had."""

import json
import shutil

import pytest

import eval as command
from engine.checkpoint import claim
from engine.config import make, settings_behind
from engine.pretrained import TINY
from tasks import world
from tasks.data import Task


def test_one_checkpoint_and_its_base(tmp_path, capsys):
    out = tmp_path / "report"
    argv = ["--model", str(TINY), "--base", "tiny", "--size", "2", "--device", "cpu", "--out", str(out), "--max-new-tokens", "20"]
    assert command.main(argv) == 0
    text = capsys.readouterr().out
    assert "| family | base | alone | with reference |" in text and "jsd_to_base 0.0000" in text and "+0.0 points" in text
    (report,) = json.loads((out / "eval.json").read_text())
    assert report["model"]["alone"]["n"] == 10 and report["paired"]["wins"] == 0
    assert (out / "eval.png").stat().st_size > 5000 and (out / "eval.md").read_text().strip() == text.strip()
    answers = sorted((out / "answers").iterdir())
    assert command.main(argv) == 0 and sorted((out / "answers").iterdir()) == answers


def test_a_run_is_asked_its_own_questions_and_so_is_its_checkpoint(tmp_path, monkeypatch):
    asked, settings = [], dict(recipe="sd", model="tiny", seed=0, data="mine.jsonl", max_new_tokens=7)
    (tmp_path / "settings.json").write_text(json.dumps(settings))

    def asks(name, **_):
        raise ValueError(asked.append(name))

    monkeypatch.setattr(command, "load_task", asks)
    for folder in (tmp_path, tmp_path / "checkpoint-4", TINY):
        assert command.main(["--model", str(folder)]) == 2
    assert asked == ["mine.jsonl", "mine.jsonl", "tiny"]
    assert settings_behind(f"{tmp_path}/checkpoint-4/") == settings and settings_behind(str(tmp_path / "other")) == {}
    with pytest.raises(ValueError, match="holds no run"):  # a checkpoint is no run's folder
        claim(make("sd", out=str(tmp_path / "checkpoint-4"), resume=True))


@pytest.mark.slow
def test_several_tasks_make_the_papers_table(tmp_path, capsys, monkeypatch):
    def fake(name, train_size, test_size):
        assert train_size is None and test_size == 2
        if name == "mbpp":
            raise ValueError("--data mbpp: the hub cannot be reached")
        small = world.load(5, 2)
        ood = small.ood if name == "scienceqa" else []
        return Task(name, [], small.test, world.score, ood, world.WORDING, 12), {}

    monkeypatch.setattr(command, "load_task", fake)
    argv = ["--model", "tiny", "--base", "tiny", "--task", "all", "--size", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(argv) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "| | scienceqa | scienceqa (out of distribution) | cos_e | toolalpaca | mean |"
    assert lines[2].startswith("| base |") and lines[3].startswith("| model |")
    assert "left out: --data mbpp" in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "no/such"], "no/such"),
        (["--model", "tiny", "--task", "no-such"], "no-such"),
        (["--model", "tiny", "--task", "all"], "not cached here"),
        (["--model", "tiny", "--task", "missing.jsonl"], "missing.jsonl"),
        (["--model", "tiny", "--out", __file__], "is a file; choose a folder"),
        (["--model", "UNFINISHED"], "that run has not finished"),
    ],
)
def test_refusals(flags, message, capsys, tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    flags = [str(tmp_path) if f == "UNFINISHED" else f for f in flags]
    assert command.main([*flags, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flags", [["--sample-batch", "0"], ["--max-new-tokens", "-3"], ["--size", "-1"]])
def test_numbers_that_make_no_sense_are_refused_by_name(flags, capsys):
    with pytest.raises(SystemExit):
        command.main(["--model", "tiny", *flags])
    assert f"argument {flags[0]}: {flags[1]} is below" in capsys.readouterr().err


def test_the_references_are_of_the_kind_that_the_run_had(tmp_path):
    """Else "with reference" would be another number than the ceiling in the run's own summary."""
    run = shutil.copytree(TINY, tmp_path / "run")
    (run / "settings.json").write_text(json.dumps({"model": "tiny", "recipe": "sd", "seed": 0, "references": "odd"}))
    for model, odd in ((str(run), True), ("tiny", False)):
        out = tmp_path / f"odd-{odd}"
        assert command.main(["--model", model, "--size", "6", "--device", "cpu", "--out", str(out)]) == 0
        rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
        assert any("i think that it may be" in row["reference"] for row in rows) == odd


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", stop)
    assert command.main(["--model", "tiny"]) == 130
    assert capsys.readouterr().err.startswith("eval.py: stopped")


@pytest.mark.slow
def test_every_answer_can_be_read(tmp_path):
    """answers.jsonl: a line per question of both sides; what is right by it is what the table counted."""
    assert command.main(["--model", "tiny", "--base", "tiny", "--size", "2", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    (report,) = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    inside, outside = rows[:10], rows[10:]
    assert len(outside) == 6 and "texts" not in report["model"]["alone"]
    for name, part in (("model", "alone"), ("base", "alone"), ("model_with_reference", "with_reference")):
        assert [r[f"{name}_correct"] for r in inside] == report["model"][part]["correct"]
    assert [r["model_correct"] for r in outside] == report["model"]["ood"]["correct"]
    assert [r["base_with_reference_correct"] for r in outside] == report["base"]["ood_with_reference"]["correct"]
    assert all(r["model"] == r["base"] and r["question"] and r["reference"] for r in rows)
