"""The report, on invented results: intervals and verdicts by hand, what is missing, and figures one can look at."""

import itertools
import re

import matplotlib.pyplot as plt
import pytest
from test_study import invent

from experiments import report, study


def runs(key="accuracy", **rows):
    """runs(ema=[80, 81]) -> {"ema": {0: {"accuracy": 80}, 1: ...}}; None stands for a seed that is missing."""
    return {
        n.replace("_", "-"): {seed: {key: v, "by_task": {}} for seed, v in enumerate(values) if v is not None}
        for n, values in rows.items()
    }


def holds(rule, **rows):
    key = report.METRICS.get(rule.split(":")[0], ("accuracy",))[0]
    return report.judge(rule, runs(key, **rows))[0]


def test_a_paired_difference_by_hand():
    # differences 2, 1, 4: mean 7/3, sd 1.5275, half 4.303 * 1.5275 / sqrt(3) = 3.795
    rows = runs(a=[90, 92, 94], b=[88, 91, 90])
    g = report.gap(rows, "a", "b", "accuracy")
    assert g.mean == pytest.approx(7 / 3) and g.half == pytest.approx(3.795, abs=1e-3) and g.n == 3
    assert str(g) == "b +2.3 ± 3.8 (3)"
    # Pairing is by seed: only seeds 1, 2 and 3 are in both, and there b is always 5 lower, however much seeds differ.
    g = report.gap(runs(a=[0, 60, 75, 90], b=[None, 55, 70, 85, 99]), "a", "b", "accuracy")
    assert (g.mean, g.half, g.n) == (5, 0, 3)
    assert str(report.gap(rows, "a", "c", "accuracy")) == "c missing"
    assert str(report.Gap("x", -1.5, float("nan"), 1)) == "x −1.5 (1)"
    assert str(report.Gap("x", 0.0, float("nan"), 1, "ratio")) == "x 1.00 (1)"
    assert str(report.Gap("x", 0.0, 0.6931472, 2, "ratio")) == "x 1.00 [0.50, 2.00] (2)"


def test_verdicts_follow_from_intervals():
    more = "accuracy: a > b"
    assert holds(more, a=[2, 2.5, 3], b=[0, 0, 0]) == 1  # 2.5 ± 1.24: above 0
    assert holds(more, a=[2, 1, 4], b=[0, 0, 0]) == 0  # 2.3 ± 3.8: too wide
    assert holds(more, a=[-0.2, 0.1, 0.4], b=[0, 0, 0]) == -1  # 0.1 ± 0.74: an advantage of 1 point is excluded
    assert holds(more, a=[-0.2, 0.1, 1.0], b=[0, 0, 0]) == 0  # 0.3 ± 1.55: not excluded
    assert holds(more, a=[-3, -2, -4], b=[0, 0, 0]) == -1
    assert holds("JSD: a > b", a=[-0.2, 0.1, 0.4], b=[0, 0, 0]) == 0  # the margin of 1 is one of accuracy only
    assert holds("accuracy: a < b", a=[0, 0, 0], b=[2, 2.5, 3]) == 1
    assert holds(more, a=[9, 9], b=[0, 0]) == 0  # two seeds are no evidence, even if they agree
    assert holds(more, a=[9, 9, None, 9], b=[0, None, 0, 0]) == 0  # nor are two pairs
    assert holds(more, a=[9, 9, 9]) == 0 and holds(more) == 0


def test_the_other_signs():
    near, least = "accuracy: a ~ b", "accuracy: a ≥ b"
    assert holds(near, a=[0.5, -0.5, 0], b=[0, 0, 0]) == 1 == holds(least, a=[0.5, -0.5, 0], b=[0, 0, 0])  # 0 ± 1.24
    assert holds(near, a=[4, 5, 6], b=[0, 0, 0]) == -1 and holds(least, a=[4, 5, 6], b=[0, 0, 0]) == 1
    assert holds(near, a=[-5, -6, -7], b=[0, 0, 0]) == -1 == holds(least, a=[-5, -6, -7], b=[0, 0, 0])
    assert holds(near, a=[-3, 1, 2], b=[0, 0, 0]) == 0 == holds(least, a=[-3, 1, 2], b=[0, 0, 0])
    cost = "step time: a ×5.4 b"
    assert holds(cost, a=[5, 5.4, 5.8], b=[1, 1, 1]) == 1  # geometric mean 5.4, [4.5, 6.5]: within 3.6 and 8.1
    assert holds(cost, a=[2, 2.1, 2.2], b=[1, 1, 1]) == -1 == holds(cost, a=[11, 10, 12], b=[1, 1, 1])
    assert holds(cost, a=[2, 5, 12], b=[1, 1, 1]) == 0
    assert "b 4.00 [4.00, 4.00] (3)" in report.judge(cost, runs("step_of_sft", a=[4, 8, 2], b=[1, 2, 0.5]))[1]


def test_and_or_and_what_is_missing():
    both = "accuracy: a > b c"
    assert holds(both, a=[9, 9, 9], b=[0, 0, 0], c=[1, 1, 1]) == 1
    assert holds(both, a=[9, 9, 9], b=[0, 0, 0]) == 0  # c could still be better
    assert holds(both, a=[5, 5, 5], b=[9, 9, 9]) == -1  # one that is better decides, whatever c does
    assert holds("accuracy: a > b ; accuracy: c > b", a=[9, 9, 9], b=[0, 0, 0], c=[0, 0, 0]) == -1
    peak = "accuracy: a > b c | accuracy: a < b c"
    assert holds(peak, a=[9, 9, 9], b=[0, 0, 0], c=[0, 0, 0]) == 1 == holds(peak, a=[0] * 3, b=[9] * 3, c=[9] * 3)
    assert holds(peak, a=[5, 5, 5], b=[0, 0, 0], c=[9, 9, 9]) == -1 == holds(peak, a=[0] * 3, b=[0] * 3, c=[0] * 3)
    assert holds(peak, a=[5, 5, 5], b=[0, 0, 0]) == 0
    assert "c missing" in report.judge(both, runs(a=[9] * 3, b=[0] * 3))[1]


def test_every_family():
    rows = runs(contrast=[0] * 3, sd=[0] * 3)
    for n, families in (("contrast", {"sum": 9, "tool": 100}), ("sd", {"sum": 5, "tool": 100})):
        for cell in rows[n].values():
            cell["by_task"] = families
    rule = "every family: contrast > sd"
    truth, said = report.judge(rule, rows)
    assert truth == -1 and said == "`contrast` − `sd`: sum +4.0 ± 0.0 (3), tool +0.0 ± 0.0 (3)"
    for cell in rows["sd"].values():
        cell["by_task"] = {"sum": 5, "tool": 90}
    assert report.judge(rule, rows)[0] == 1 and report.judge(rule, {})[0] == 0


def test_every_rule_speaks_of_rows_and_metrics_that_exist():
    for part, many in zip(report.PLAN["claims"], (9, 7), strict=True):
        assert len(part["rules"]) == many and len(part["verdicts"]) == 3
        for condition in itertools.chain(*(re.split("[;|]", rule) for rule in part["rules"].values())):
            metric, rest = condition.strip().split(": ")
            me, sign, *others = rest.split()
            assert metric in report.METRICS and sign[0] in "<>≥~×" and others
            assert {me, *others} <= set(study.ROWS)
    assert {n for members, *_ in report.KINDS.values() for n in members} <= set(study.ROWS)


def test_a_page_from_nothing_and_from_little(tmp_path):
    assert report.write(tmp_path) == [] and (tmp_path / "claims.md").read_text().startswith("# The paper's claims")
    invent(tmp_path, "clean", "sd", 0)
    invent(tmp_path, "hot", "sd", 0)
    (tmp_path / "figures/cost.png").write_text("of an earlier call")
    assert report.write(tmp_path) == ["curves-clean"] and not (tmp_path / "figures/cost.png").exists()
    page = (tmp_path / "claims.md").read_text()
    verdicts = re.findall(r"\*\*(.*?)\*\* \|", page)
    assert verdicts == ["cannot tell"] * 16 and "ema − agree-token" not in page and "`ema` − agree-token missing" in page
    assert "## clean" in page and "## hot" not in page  # no claim about hot has a single number


@pytest.fixture(scope="module")
def study_of_ours(tmp_path_factory):
    """Seeds differ by 3 points, rows by what is said here; sft drifts, ema is weak, five rows share one point."""
    out = tmp_path_factory.mktemp("study")
    rows = {"sft": 79, "ssd": 37, "sd": 92, "agree-token": 88, "agree-seq": 92, "ema": 82, "contrast": 92, "match": 92}
    rows |= {"clip": 92, "unisd-star": 88, "star-no-ema": 90, "star-no-agreement": 91, "star-no-match": 88}
    rows |= {"budget-10": 88, "budget-25": 88, "budget-25-random": 88, "official-star": 90}
    for (row, accuracy), seed in itertools.product(rows.items(), range(3)):
        more = dict(jsd_to_base=0.33, retention_ppl=2e4) if row == "sft" else {}
        wobble = 3 * seed + 0.1 * ((seed * 7 + len(row)) % 3)
        seconds = 1 if row == "sft" else 5.4 if "agree" in row else 2.5
        invent(out, "clean", row, seed, accuracy + wobble, seconds * (1 + seed), steps=8, **more)
    return out


def test_verdicts_on_the_page(study_of_ours):
    page = report.page(study.read(study_of_ours), [])
    verdict = {line.split(" | ")[0][2:]: line.rsplit("**", 2)[1] for line in page.splitlines() if "** |" in line}
    expected = {
        "EMA is the strongest": "not reproduced",  # although match-repr is missing
        "Token agreement": "reproduced",
        "Contrast helps": "not reproduced",
        "Clipping": "not reproduced",  # as accurate, but the gradient norms are the same to the last digit
        "Self-distillation drifts": "reproduced",
        "UniSD* is best": "not reproduced",
        "Accuracy is not monotone": "cannot tell",
        "A larger γ": "cannot tell",
        "Sequence agreement costs": "reproduced",
        "Sequence weights": "cannot tell",
        "In UniSD*, an EMA": "does not hold",
        "UniSD* does better than": "does not hold",
        "Every part": "does not hold",
        "Agreement on the least": "holds",
        "... and cheaper": "does not hold",
        "... and better": "does not hold",
    }
    assert len(verdict) == len(expected)
    for begin, word in expected.items():
        assert [v for claim, v in verdict.items() if claim.startswith(begin)] == [word], begin


@pytest.mark.slow
def test_figures_can_be_looked_at(study_of_ours):
    out, drawn = study_of_ours, report.write(study_of_ours)
    assert (out / "claims.md").read_text() == report.page(study.read(out), drawn)
    assert drawn == ["curves-clean", "drift-clean", "cost", "leave-one-out"]
    for name in drawn:
        picture = out / f"figures/{name}.png"
        image = plt.imread(picture)[..., :3]
        assert image.shape[1] == 900 and 5e3 < picture.stat().st_size < 120e3
        assert (image < 0.9).any(-1).mean() > 0.01  # ink
        assert f"figures/{name}.png" in (out / "claims.md").read_text()


def test_every_row_of_a_scatter_is_in_its_legend_with_a_look_of_its_own(study_of_ours):
    found = study.read(study_of_ours)
    with plt.rc_context(report.STYLE):
        figure = report.scatter(found, "clean", "jsd", "nats")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    rows = [f"{n} (3)" for n in found["clean"] if n[:8] not in ("star-no-", "budget-2") or n == "budget-25"]
    assert sorted(names) == sorted([*rows, "base", "base with the reference"])
    looks = [(line.get_color(), line.get_marker()) for line, *_ in figure.axes[1].containers]
    assert len(set(looks)) == len(looks) == len(rows)
    plt.close(figure)


def test_curves_use_the_steps_that_most_seeds_measured(tmp_path):
    for seed, steps in enumerate((8, 8, 5)):
        invent(tmp_path, "clean", "sd", seed, accuracy=80 + seed, steps=steps)
        invent(tmp_path, "clean", "sft", seed, accuracy=80, steps=8)
    with plt.rc_context(report.STYLE):
        figure = report.curves(study.read(tmp_path), "clean")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert set(lines) == {"sd (2)", "sft (3)"}
    assert list(lines["sd (2)"].get_xdata()) == [1, 8] and lines["sd (2)"].get_ydata()[-1] == pytest.approx(80.5 - 1 / 8)
    plt.close(figure)
