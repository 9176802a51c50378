"""report.py - what a study says: its figures, and the paper's claims beside its numbers.

    python -m experiments.report runs/study       reads cells.json there, writes figures/*.png and claims.md beside it

The idea: rows are compared by differences *paired by seed* (the same seed is the same questions in the same order), with the
95 % interval of their mean (Student's t over the seeds). A claim is a rule about such intervals, printed beside its verdict,
which is "cannot tell" while rows or seeds are missing or intervals are too wide: so a verdict follows from no wish.
`found` is {setting: {row: {seed: numbers of one run}}}, see study.read; `rows` is one setting of it.
Depends on study.py (what a run says), watch.py (colours); matplotlib.   Try it:  python -m pytest tests/test_report.py -q
"""

import argparse
import math
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from engine.checkpoint import command, writable
from engine.watch import INK
from experiments import study
from experiments.study import PLAN

MIN_SEEDS = 3  # no verdict and no error bar from fewer: with two, Student's t is 12.7
MARGINS = PLAN["margins"]
METRICS = PLAN["metrics"]  # name in a rule -> key of a run's numbers, how a difference is printed, the margin of an advantage
CLOSE, FACTOR = MARGINS["close"], math.log(MARGINS["factor"])
# sign -> the bounds that the interval of a - b must keep: direction (1 from below, -1 from above), bound
SIGNS = {">": [(1, 0.0)], "<": [(-1, 0.0)], "≥": [(1, -CLOSE)], "~": [(1, -CLOSE), (-1, -CLOSE)]}
SIGNS["×"] = [(1, -FACTOR), (-1, -FACTOR)]  # of log(a / b) - log(the number after the sign)
COLOURS = [INK[1], "black", INK[0], INK[2], INK[3], INK[4]]
KINDS = {kind: (rows.split(), colour) for (kind, rows), colour in zip(PLAN["kinds"].items(), COLOURS, strict=True)}


# --- numbers -> verdicts: +1 yes, 0 cannot tell, -1 no; so "and" is the minimum and "or" the maximum
class Gap(NamedTuple):
    """A difference paired by seed: mean, half of its 95 % interval, over how many seeds, and how it is printed."""

    name: str
    mean: float
    half: float
    n: int
    form: str = "{:+.1f}"

    def above(self, direction: int, bound: float, small: float) -> int:
        """+1: all of direction x interval is above bound. -1: all of it is at most bound + small, no advantage that counts."""
        low, high = direction * self.mean - self.half, direction * self.mean + self.half
        return 0 if self.n < MIN_SEEDS else 1 if low > bound else -1 if high <= bound + small else 0

    def __str__(self) -> str:
        if not self.n:
            return f"{self.name} missing"
        if self.form == "ratio":
            ends = math.exp(self.mean - self.half), math.exp(self.mean + self.half)
            numbers = "{:.2f} [{:.2f}, {:.2f}]".format(math.exp(self.mean), *ends)
        else:
            numbers = f"{self.form} ± {self.form.replace('+', '')}".format(self.mean, self.half).replace("-", "−")
        return f"{self.name} {numbers} ({self.n})".replace(" ± nan", "").replace(" [nan, nan]", "")  # a single seed


def gap(rows: dict, a: str, b: str, key: str, form: str = "{:+.1f}", name: str = "") -> Gap:
    """Row a minus row b over the seeds that both have, of a number of a run or of one of its families; "ratio": of its log."""
    number = lambda run: (run | run["by_task"]).get(key, math.nan)
    value = (lambda run: math.log(number(run))) if form == "ratio" else number
    shared = sorted(rows.get(a, {}).keys() & rows.get(b, {}).keys())
    differences = [value(rows[a][seed]) - value(rows[b][seed]) for seed in shared]
    return Gap(name or b, *study.spread(differences), sum(d == d for d in differences), form)


def condition(rule: str, rows: dict) -> tuple[int, str]:
    """'accuracy: ema > sd clip' -> does it hold (+1, 0, -1), and the numbers that say so."""
    metric, rest = rule.strip().split(": ")
    row, sign, *baselines = rest.split()
    key, form, margin = METRICS[metric]
    head = f"{metric}, `{row}` {'/' if form == 'ratio' else '−'} "
    if metric == "every family":
        head = f"`{row}` − `{baselines[0]}`: "
        families = next((run["by_task"] for run in rows.get(row, {}).values()), ["families"])
        gaps = [gap(rows, row, baselines[0], family, form, family) for family in families]
    else:
        gaps = [gap(rows, row, baseline, key, form) for baseline in baselines]
    center = math.log(float(sign[1:] or 1))
    small = MARGINS[margin] if margin and sign in "<>" else 0.0  # the margins of the other signs are in their bounds
    verdicts = [g.above(way, bound + way * center, small) for g in gaps for way, bound in SIGNS[sign[0]]]
    return min(verdicts), head + ", ".join(map(str, gaps))


def judge(rule: str, rows: dict) -> tuple[int, str]:
    """A whole rule -> +1, 0 or -1, and its numbers (those of its first alternative: the others have the same)."""
    ways = [[condition(part, rows) for part in way.split(";")] for way in rule.split("|")]
    return max(min(verdict for verdict, _ in way) for way in ways), "<br>".join(text for _, text in ways[0])


def page(found: dict, figures: list[str]) -> str:
    """claims.md: rules and verdicts per setting; outside the clean one, only claims about which there is a number."""
    lines = [PLAN["page"]["claims"].format(seeds=MIN_SEEDS, **MARGINS)]
    for setting, rows in found.items():
        flags = " ".join(study.SETTINGS.get(setting, ())) or "no extra flags"
        for part in PLAN["claims"]:
            table = []
            for claim, rule in part["rules"].items():
                verdict, numbers = judge(rule, rows)
                if setting == "clean" or re.search(r"\(\d+\)", numbers):
                    rule = rule.replace(" |", ", or").replace(" ;", ";")
                    table.append(f"| {claim} | `{rule}` | {numbers} | **{part['verdicts'][verdict]}** |")
            head = [f"## {setting} (`{flags}`): {part['title']}", "", "| claim | rule | here | verdict |", "|---|---|---|---|"]
            lines += [*head, *table, ""] if table else []
    return "\n".join(lines + [f"![{name}](figures/{name}.png)\n" for name in figures])


# --- numbers -> figures; (n) is the number of seeds
STYLE = {"figure.constrained_layout.use": True, "figure.titlesize": 10, "axes.titlesize": 9, "legend.fontsize": 8}
STYLE |= {"axes.grid": True, "grid.alpha": 0.25, "lines.markersize": 5, "savefig.dpi": 100, "xtick.labelsize": 8}
interval = lambda runs, key: study.spread((run[key] for run in runs.values()), MIN_SEEDS)  # nan: no error bar
log_ticks = lambda: dict(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())


def finish(figure, title: str, columns: int):
    """Title and a legend with one entry of each kind; None instead of a figure in which nothing is drawn."""
    entries = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)
    figure.suptitle(title)
    return figure if entries else None


def scatter(found: dict, setting: str, key: str, unit: str):
    """Accuracy against drift ("jsd") or cost ("step_of_sft"): left all rows, right those near the median row, from near."""
    rows, points = found.get(setting, {}), []
    for kind, colour in KINDS.values():  # a colour for each kind, a marker for each of its rows
        for name, marker in ((name, marker) for name, marker in zip(kind, "os^DvPX", strict=False) if name in rows):
            (x, half), (y, bar) = interval(rows[name], key), interval(rows[name], "accuracy")
            low, high = x - half, x + half
            if key == "step_of_sft":
                x, low, high = study.median_and_range(run[key] for run in rows[name].values())
            look = dict(fmt=marker, color=colour, ms=8, mec="white", elinewidth=0.8, label=f"{name} ({len(rows[name])})")
            points += [(x, y, look | dict(xerr=[[x - low], [high - x]], yerr=bar))] if x > 0 else []
    if len(points) < 3:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 5))
    for axis in axes:
        axis.set(xlabel=unit, ylabel="held-out accuracy, per cent")
        for x, y, look in points:
            axis.errorbar(x, y, **look)
    axes[0].set_xscale("log")
    axes[0].xaxis.set(**log_ticks())
    mid_x, mid_y = (statistics.median(point[i] for point in points) for i in (0, 1))
    near = [(x, y) for x, y, _ in points if mid_x / 2.3 < x < mid_x * 2.3 and abs(y - mid_y) < 14] or [(mid_x, mid_y)]
    xs, ys = zip(*near, strict=True)
    axes[1].set(xlim=(min(xs) / 1.1, max(xs) * 1.1), ylim=(min(ys) - 3, max(ys) + 3))
    for level, name, style in (("before", "base", "--"), ("ceiling", "base with the reference", ":")):
        height = statistics.mean(run[level] for runs in rows.values() for run in runs.values())
        axes[0].axhline(height, color="0.4", ls=style, lw=1, label=name)
    return finish(figure, f"{setting} references: mean and 95 % interval (seeds), right: the crowd from near", 5)


def curves(found: dict, setting: str):
    """What happens during training: mean over the seeds, band from the lowest to the highest."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.6))
    titles = "accuracy without reference: student", "accuracy with reference: teacher", "divergence (mean of 20 steps)"
    for axis, key, title in zip(axes, ("student_accuracy", "teacher_accuracy", "div"), titles, strict=True):
        for colour, name in zip(INK, "sft sd agree-token ema unisd-star".split(), strict=False):
            runs = found.get(setting, {}).get(name, {}).values()
            runs = [dict(run["curves"][key]) for run in runs if run["curves"][key]]
            if not runs:
                continue
            (steps, _), *_ = Counter(map(tuple, runs)).most_common(1)  # the steps that most seeds measured
            seeds = [list(run.values()) for run in runs if tuple(run) == steps]
            values = list(zip(*seeds, strict=True))
            axis.fill_between(steps, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.2, lw=0)
            axis.plot(steps, [*map(statistics.mean, values)], color=colour, label=f"{name} ({len(seeds)})")
        axis.set(title=title, xlabel="optimizer step", ylabel="nats per token" if key == "div" else "per cent")
    axes[2].set_yscale("log")
    axes[2].yaxis.set(**log_ticks())
    return finish(figure, f"{setting} references: mean over (seeds), band from the lowest to the highest seed", 5)


def leave_one_out(found: dict):
    """UniSD* without one of its parts, or otherwise changed: accuracy and drift minus those of UniSD*."""
    names = "star-no-ema star-no-agreement star-no-contrast star-no-match star-clip official-star".split()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, key, unit in zip(axes, ("accuracy", "jsd"), ("accuracy, points", "JSD to the base, nats"), strict=True):
        for k, setting in enumerate(("clean", "wrong")):
            gaps = [gap(found.get(setting, {}), name, "unisd-star", key) for name in names]
            for y, g in ((y + k / 4, g) for y, g in enumerate(gaps) if g.n >= MIN_SEEDS):
                axis.errorbar(g.mean, y, xerr=g.half, fmt="os"[k], color=INK[k], label=setting)
                axis.annotate(f"({g.n})", (g.mean, y), (5, 2 - 9 * k), textcoords="offset points", size=7)
        axis.axvline(0, color="0.4", lw=1)
        axis.set(xlabel=f"{unit}: row minus UniSD*", yticks=range(len(names)), yticklabels=names, ylim=(5.6, -0.4))
        axis.locator_params(axis="x", nbins=6)
    return finish(figure, "UniSD* with one thing changed: difference paired by seed, 95 % interval (seeds)", 2)


FIGURES = {f"curves-{setting}": (curves, setting) for setting in ("clean", "wrong")}
FIGURES |= {f"drift-{setting}": (scatter, setting, "jsd", "JSD to the base, nats per token") for setting in ("clean", "wrong")}
FIGURES["cost"] = scatter, "clean", "step_of_sft", "step time / that of sft (bar: fastest to slowest seed)"
FIGURES["leave-one-out"] = (leave_one_out,)


def write(out: Path) -> list[str]:
    """<out>/figures/*.png and <out>/claims.md from what study.read finds there. -> the figures there was enough data for."""
    found, drawn, folder = study.read(out), [], out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, (draw, *options) in FIGURES.items():
            (folder / f"{name}.png").unlink(missing_ok=True)  # an earlier one would show what is no longer there
            if figure := draw(found, *options):
                figure.savefig(folder / f"{name}.png")
                drawn.append(name)
        plt.close("all")
    (out / "claims.md").write_text(page(found, drawn), encoding="utf-8")
    return drawn


@command("report.py")
def main(argv: list[str] | None = None) -> int:
    """Figures and the page of claims from the runs of a study."""
    parser = argparse.ArgumentParser(prog="report.py", description=main.__doc__)
    parser.add_argument("out", nargs="?", default="runs/study", help="the study's --out (default: %(default)s)")
    out = writable(parser.parse_args(argv).out, "OUT")
    print(f"{', '.join(write(out)) or 'no figures'} and claims.md -> {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
