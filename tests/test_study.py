"""The study: spread by hand, a run of two cells, and that it goes on where it stopped."""

import json
import math

import pytest

import study


def test_spread_by_hand():
    # mean 2, sd 1, n 3: 4.30 * 1 / sqrt(3) = 2.4826
    mean, half = study.spread([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(2.4826, abs=1e-3)
    assert study.spread([math.nan, 1.0, 3.0, math.nan])[0] == 2.0 and math.isnan(study.spread([math.nan] * 3)[0])
    assert study.spread([5.0])[0] == 5.0 and math.isnan(study.spread([5.0])[1]) and math.isnan(study.spread([])[0])


def test_two_cells_and_again(tmp_path, capsys):
    fast = "--train --steps 2 --batch 4 --micro-batch 4 --eval-size 1 --train-size 50 --teacher-every 0 --device cpu".split()
    command = ["--recipes", "sft", "sd", "--seeds", "1", "--out", str(tmp_path), *fast]
    assert study.main(command) == 0
    table = json.loads((tmp_path / "table.json").read_text())["clean"]
    assert set(table) == {"sft", "sd"} and table["sd"]["seeds"] == 1
    assert "| sft |" in (tmp_path / "table.md").read_text() and "| 1.0 |" in (tmp_path / "table.md").read_text()
    stamp = (tmp_path / "runs/clean/sd-seed0/summary.json").stat().st_mtime_ns
    assert study.main(command) == 0  # nothing is run twice
    assert (tmp_path / "runs/clean/sd-seed0/summary.json").stat().st_mtime_ns == stamp
    capsys.readouterr()


def test_a_failed_run_is_in_the_table(tmp_path, capsys):
    assert (
        study.main(["--recipes", "sd", "--seeds", "1", "--out", str(tmp_path), "--train", "--max-new-tokens", "600"])
        == 1
    )
    assert "failed" in (tmp_path / "table.md").read_text()
    assert "leaves no room in the model's context" in capsys.readouterr().out + (tmp_path / "table.md").read_text()
