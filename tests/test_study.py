"""The study: spread by hand, what fits into its hours, the table from whatever is finished, two real cells, stopping."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import wait_for

from engine.config import parse
from experiments import study


def invent(out, setting, row, seed, accuracy=80.0, seconds=1.0, steps=3, **more):
    """A finished run with known numbers: what train.py leaves behind, as far as the study reads it."""
    folder = out / "runs" / setting / f"{row}-seed{seed}"
    folder.mkdir(parents=True)
    families = dict.fromkeys(("sum", "choice", "fact", "code", "tool"), accuracy)
    after = {"accuracy": accuracy, "by_task": families, "jsd_to_base": 0.03, "retention_ppl": 1.3, "reverse_ppl": 1.4}
    parts = {"s_sampling": seconds / 4, "s_scoring": seconds / 2, "s_update": seconds / 4}
    log = [{"step": t, "grad_norm": more.get("norm", 1.0), "div": 1 / t, **parts} for t in range(1, steps + 1)]
    for r in log[:: max(1, steps - 1)]:
        r |= {"student_accuracy": accuracy - 1 / r["step"], "teacher_accuracy": 88.0}
    summary = {
        "steps": steps,
        "before": {"accuracy": 39.0},
        "ceiling": {"accuracy": 87.0},
        "after": after | {k: v for k, v in more.items() if k in after},
        "ood": {"before": {"accuracy": 30.0}, "after": {"accuracy": 20.0}, "ceiling": {"accuracy": 80.0}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))


def test_spread_by_hand():
    # mean 2, sd 1, n 3: 4.303 * 1 / sqrt(3) = 2.4843
    mean, half = study.spread([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(2.4843, abs=1e-3)
    assert study.spread([math.nan, 1.0, 3.0, math.nan])[0] == 2.0 and math.isnan(study.spread([math.nan] * 3)[0])
    assert study.spread([5.0])[0] == 5.0 and math.isnan(study.spread([5.0])[1]) and math.isnan(study.spread([])[0])


def test_what_the_help_promises():
    hours = lambda plan, seeds: sum(study.Cell(s, r, 0).expected() for s in plan for r in plan[s]) * seeds / 2 / 3600
    assert all(set(rows) <= set(study.ROWS) for rows in study.FULL.values()) and set(study.FULL) == set(study.SETTINGS)
    full = {world: {s: rows for s, rows in study.FULL.items() if study.WORLD_OF[s] == world} for world in study.WORLDS}
    assert hours(full["tiny"], 5) < 3
    assert hours({"clean": study.QUICK}, study.QUICK_SEEDS) * 60 < 10
    assert all(study.Cell("sums", row, 0).expected() <= 2 * 15 * 60 for row in full["real"]["sums"])  # of one core


def test_the_table_has_what_is_finished_and_nothing_else(tmp_path):
    for seed in range(3):
        invent(tmp_path, "clean", "unisd-star", seed, accuracy=85.0 + seed, seconds=(1.0, 6.0, 90.0)[seed])
        invent(tmp_path, "clean", "sft", seed, accuracy=79.0, seconds=2.0, retention_ppl=20000.0 + seed)
    invent(tmp_path, "clean", "sd", 0, accuracy=90.0)
    invent(tmp_path, "clean", "raw", 0, accuracy=39.0, steps=0)
    invent(tmp_path, "clean", "my-own", 7)  # a row that this version does not know is still a result
    bad = tmp_path / "runs/wrong/sd-seed0"
    bad.mkdir(parents=True)
    (bad / "failed.txt").write_text("out of memory\n")
    lines = study.write(study.read(tmp_path), tmp_path).splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [r[0] for r in rows] == ["| recipe", "| raw", "| sft", "| sd", "| unisd-star", "| my-own"]
    star, head = rows[4], rows[0]
    cell = dict(zip([h.strip("| ") for h in head], [c.strip("| ") for c in star], strict=True))
    assert cell["accuracy"] == "86.0 ± 2.5" and cell["gain"] == "+47.0" and cell["seeds"] == "3"
    assert cell["step time / SFT"] == "3.0"  # the median of 1, 6 and 90 seconds over 2: one slow seed does not matter
    assert "20,001 ± 2" in "\n".join(lines) and rows[3][1] == "90.0"  # one seed: no interval
    assert "nan" not in "\n".join(lines) and "NaN" not in (tmp_path / "cells.json").read_text()
    assert "- failed: sd-seed0: out of memory" in lines
    # Another day, another speed: runs of one day are compared with the sft of that day, or with none.
    for row, days in (("sd", {1: 4.0}), ("sft", {3: 4.0}), ("ema", {0: 9.0})):
        for seed, seconds in days.items():
            invent(tmp_path, "clean", row, seed, seconds=seconds)
            then = time.time() - (86400 if row != "ema" else 2 * 86400)
            os.utime(tmp_path / f"runs/clean/{row}-seed{seed}/summary.json", (then, then))
    rows = study.read(tmp_path)["clean"]
    assert rows["sd"][1]["step_of_sft"] == 1.0 and math.isnan(rows["ema"][0]["step_of_sft"])
    assert study.median_and_range(run["step_of_sft"] for run in rows["unisd-star"].values()) == (3.0, 0.5, 45.0)
    lines = study.write(study.read(tmp_path), tmp_path).splitlines()
    # The runs themselves may go: the numbers are kept.
    before = (tmp_path / "cells.json").read_text()
    shutil.rmtree(tmp_path / "runs/clean")
    assert study.write(study.read(tmp_path), tmp_path).splitlines() == lines
    assert (tmp_path / "cells.json").read_text() == before


def test_a_perplexity_over_orders_of_magnitude_is_a_median_and_a_range(tmp_path):
    for seed, ppl in enumerate((700.0, 250000.0, 14000.0)):  # mean 88,233, half-width 348,639
        invent(tmp_path, "clean", "opsd", seed, retention_ppl=ppl)
    assert "| 14,000 [700, 250,000] |" in study.write(study.read(tmp_path), tmp_path)


def test_runs_of_different_length_are_not_mixed_silently(tmp_path):
    invent(tmp_path, "clean", "sd", 0)
    invent(tmp_path, "clean", "raw", 0, steps=0)
    assert "different length" not in study.write(study.read(tmp_path), tmp_path)
    invent(tmp_path, "clean", "sd", 1, steps=2)
    assert "Runs of different length ([2, 3] steps)" in study.write(study.read(tmp_path), tmp_path)


@pytest.mark.slow
def test_two_cells_and_again(tmp_path, capsys, monkeypatch):
    fast = "--train --steps 2 --batch 4 --micro-batch 4 --eval-size 1 --train-size 50 --teacher-every 0 --device cpu".split()
    command = ["--recipes", "sft", "sd", "--seeds", "1", "--out", str(tmp_path), *fast]
    invent(tmp_path, "clean", "sft", 5, steps=2, seconds=1e-9)  # of an earlier call
    (tmp_path / "flags.txt").write_text(" ".join(fast[1:]))
    assert study.main(command) == 0
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert [(c["setting"], c["row"], c["seed"]) for c in cells] == [("clean", "sft", k) for k in (0, 5)] + [("clean", "sd", 0)]
    shutil.rmtree(tmp_path / "runs")
    assert "| sft |" in (tmp_path / "table.md").read_text()
    assert "cannot tell" in (tmp_path / "claims.md").read_text()
    said = capsys.readouterr()
    assert "2 runs, 2 to do" in said.out and "left" in said.err
    begun = []
    monkeypatch.setattr(study.subprocess, "run", lambda command, **_: begun.append(command[2]))
    assert study.main(command) == 0  # nothing is run twice
    assert begun == ["experiments.report"]


@pytest.mark.slow
def test_a_failed_run_is_named_until_it_succeeds(tmp_path, capsys):
    assert study.main(["--recipes", "sd", "--seeds", "1", "--out", str(tmp_path), "--train", "--max-new-tokens", "600"]) == 1
    assert "failed: sd-seed0" in (tmp_path / "table.md").read_text()
    assert "leaves no room in the model's context" in (tmp_path / "table.md").read_text()
    assert not (tmp_path / "claims.md").exists()  # nothing is finished: nothing to report
    fast = "--steps 1 --batch 2 --eval-size 1 --train-size 50 --teacher-every 0".split()
    assert study.run(study.Cell("clean", "sd", 0), tmp_path, fast) == ""
    assert "failed" not in study.write(study.read(tmp_path), tmp_path)


@pytest.mark.slow
def test_a_killed_study_leaves_its_runs_alive(tmp_path):
    """It once read them through a pipe: the first line that a run then wrote to nobody ended it, without a checkpoint."""
    fast = "--train --steps 12 --batch 8 --micro-batch 8 --eval-size 1 --train-size 50 --teacher-every 0 --device cpu".split()
    command = [sys.executable, "-m", "experiments.study", "--recipes", "sd", "--seeds", "1", "--out", str(tmp_path), *fast]
    with subprocess.Popen(command, cwd=study.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as begun:
        folder = tmp_path / "runs/clean/sd-seed0"
        wait_for((folder / "log.jsonl").exists, 90)
        begun.kill()
    wait_for((folder / "summary.json").exists, 90)
    assert len((folder / "log.jsonl").read_text().splitlines()) == 12


def test_ctrl_c_begins_nothing_further(tmp_path, monkeypatch, capsys):
    begun, lock = [], threading.Lock()

    def run(cell, out, extra):
        with lock:
            begun.append(cell)
        if len(begun) == 1:
            raise KeyboardInterrupt
        time.sleep(0.3)
        return ""

    monkeypatch.setattr(study, "run", run)
    assert study.main(["--recipes", "sd", "--seeds", "6", "--jobs", "1", "--out", str(tmp_path)]) == 130
    assert len(begun) <= 2 and "goes on" in capsys.readouterr().err


def test_a_row_keeps_its_own_flags(tmp_path, monkeypatch):
    """It is what it is called: of two flags the last one counts, and those of the row and of the cell come after --train's."""
    begun = []
    monkeypatch.setattr(study.subprocess, "run", lambda command, **_: begun.append(command) or SimpleNamespace(returncode=0))
    extra = ["--recipe", "sft", "--seed", "9", "--out", "elsewhere", "--batch", "5"]
    assert study.run(study.Cell("clean", "ema", 1), tmp_path, extra) == ""
    cfg = parse(begun[0][2:])
    assert (cfg.recipe, cfg.seed, cfg.out, cfg.batch) == ("ema", 1, str(tmp_path / "runs/clean/ema-seed1"), 5)


def test_runs_under_other_flags_are_not_taken_for_these(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "flags.txt").write_text("--steps 3\n")
    assert study.main(["--recipes", "raw", "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "holds runs with --train --steps 3: give the same, or choose another folder" in capsys.readouterr().err
    assert study.main(["--recipes", "raw", "--seeds", "0", "--out", str(tmp_path), "--train", "--steps", "3"]) == 0
    assert "**With `--train --steps 3`.**" in (tmp_path / "table.md").read_text()
