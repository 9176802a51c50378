"""docs/when-it-helps.md says what the runs say, beside what was expected of them before."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from experiments import study
from experiments.report import gap

ROOT = Path(__file__).parents[1]
PLAN = tomllib.loads((ROOT / "experiments/regimes.toml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/when-it-helps.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((ROOT / "notebooks/09_when_it_helps.ipynb").read_text(encoding="utf-8"))
minus = lambda text: text.replace("-", "−")


@pytest.fixture(scope="module")
def found():
    """Runs by "row" within a setting, and as "setting/row" of the clean study and of the one with wrong references."""
    everything = study.read(ROOT / "experiments/results/regimes")
    others = study.read(ROOT / "experiments/results")
    named = {f"{s}/{row}": runs for s in ("clean", "wrong") for row, runs in others[s].items()}
    return {setting: rows | named for setting, rows in everything.items()}


def came_out(found, comparison):
    """ "odd: clip - sd" -> ("−3.4 ± 1.2", mean, half, seeds), or None if it was not run."""
    setting, _, rows = comparison.partition(": ")
    row, _, against = rows.partition(" - ")
    runs = found.get(setting, {})
    if row not in runs:
        return None
    if against:
        difference = gap(runs, row, against, "accuracy")
        mean, half, n, form = difference.mean, difference.half, difference.n, "{:+.1f} ± {:.1f}"
    else:
        (mean, half), n, form = study.spread(r["accuracy"] for r in runs[row].values()), len(runs[row]), "{:.1f} ± {:.1f}"
    return minus(form.format(mean, half)).replace(" ± nan", ""), mean, half, n


def test_every_row_of_the_plan_is_a_known_one_and_every_comparison_was_planned():
    for setting, rows in PLAN["full"].items():
        assert set(rows.split()) <= study.ROWS.keys() and setting in PLAN["settings"] and setting in PLAN["predictions"]
    for comparison, (low, high) in PLAN["expected"].items():
        setting, _, rows = comparison.partition(": ")
        assert rows.split(" - ")[0] in PLAN["full"][setting].split() and low < high


def test_the_page_has_every_comparison_as_it_came_out(found):
    """| `odd`: `clip` − `sd` | +1 to +5 | −3.4 ± 1.2 | 5 |"""
    rows = re.findall(r"^\| `([\w-]+)`: (.+?) \| (.+?) \| (.+?) \| (\d|–) \|$", PAGE, re.MULTILINE)
    shown = {f"{setting}: {names.replace('`', '').replace(' − ', ' - ')}": cells for setting, names, *cells in rows}
    assert shown.keys() == PLAN["expected"].keys()
    for comparison, (expected, result, seeds) in shown.items():
        low, high = PLAN["expected"][comparison]
        sign = "+d" if " - " in comparison else "d"
        assert expected == minus(f"{low:{sign}} to {high:{sign}}").replace("+0", "0"), comparison
        out = came_out(found, comparison)
        if out is None:
            assert result == "not run" and seeds == "–", comparison
        else:
            assert (result, int(seeds)) == (out[0], out[3]), comparison


def test_what_was_measured_before_training_is_what_the_notebook_printed():
    printed = "".join("".join(o.get("text", "")) for c in NOTEBOOK["cells"] for o in c.get("outputs", []))
    (table,) = re.findall(r"^\| mechanism \| .*?\n\n", PAGE, re.MULTILINE | re.DOTALL)
    numbers = re.findall(r"\*\*([\d.]+)\*\*", table)
    assert len(numbers) >= 9
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", printed), number
