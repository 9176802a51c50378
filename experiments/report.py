"""report.py - what a study says: its figures, and the paper's claims beside its numbers.

    python -m experiments.report results          reads results/cells.json, writes results/figures/*.png and results/claims.md

What: rows are compared by differences *paired by seed* (the same seed is the same questions in the same order), with the
95 % interval of their mean (Student's t over the seeds). A claim is a rule about such intervals, printed beside its
verdict, which is "cannot tell" while rows or seeds are missing or intervals too wide. Partial results are ordinary: each
number carries its number of seeds, and a figure without enough data is not drawn.

`found` is {setting: {row: {seed: numbers of one run}}}, see study.read; `rows` is one setting of it.
Depends on study.py (what a run says), watch.py (colours); matplotlib.   Try it:  python -m pytest tests/test_report.py -q
"""

import argparse
import math
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from engine.watch import INK
from experiments import study

MIN_SEEDS = 3  # no verdict and no error bar from fewer: with two, Student's t is 12.7
SMALL = 1.0  # points of accuracy, 5 of the 500 held-out questions: a smaller advantage is none
CLOSE = 2.0  # points of accuracy: about what a recipe differs by from seed to seed
FACTOR = 1.5  # between step times: other work on the machine moves them by as much

# Claim :: rule; a rule is "metric: row > others", joined by ";" (and) or "|" (or). INTRO says what the signs mean.
PAPER = """
EMA is the strongest single mechanism (72.5, as sequence agreement; the others 70.3 to 72.2)
    :: accuracy: ema > agree-token contrast match match-repr clip ; accuracy: ema ≥ agree-seq
Token agreement is aggressive, sequence agreement steadier (72.2, 72.5)
    :: accuracy: agree-seq > agree-token ; worst family: agree-seq > agree-token
Contrast helps every family (71.9; base 67.9); here against `sd`, since every row gains on the base
    :: every family: contrast > sd
Clipping is the light stabiliser (70.3) :: accuracy: clip ~ sd ; gradient norm: clip < sd
Self-distillation drifts less than SFT (JSD of UniSD* .041, of SFT .054; retention PPL of SFT 1.14 → 1.68)
    :: JSD: sft > sd unisd-star ; retention PPL: sft > sd unisd-star
UniSD* is best overall (73.3; the next 72.5)
    :: accuracy: unisd-star > sft ssd sdft gkd opsd sd agree-token agree-seq ema contrast match match-repr clip
Accuracy is not monotone in K, the number of contexts (here 2, 3, 5)
    :: accuracy: agree-token > agree-token-k2 agree-token-k5 | accuracy: agree-token < agree-token-k2 agree-token-k5
A larger γ trades peak for stability (here γ .1 against 10)
    :: accuracy: agree-token-gamma10 < agree-token-gamma0.1 ; gradient norm: agree-token-gamma10 < agree-token-gamma0.1
Sequence agreement costs 5.4 × SFT (about 100 min against 18.6) :: step time: agree-seq ×5.4 sft
"""
OURS = """
Sequence weights that act do better than the official ones, which cancel :: accuracy: agree-seq > official-agree-seq
In UniSD*, an EMA teacher that moves does better than one that stays at the base :: accuracy: unisd-star > star-no-ema
UniSD* does better than as the official code computes it (both of the above) :: accuracy: unisd-star > official-star
Every part of UniSD* helps it
    :: accuracy: unisd-star > star-no-ema star-no-agreement star-no-contrast star-no-match
Agreement on the least certain quarter of the answers is as good as on all :: accuracy: budget-25 ≥ unisd-star
... and cheaper :: step time: budget-25 < unisd-star
... and better than on a random quarter :: accuracy: budget-25 > budget-25-random
"""
METRICS = {  # name in a rule -> key of a run's numbers, how a difference is printed, the difference that is too small
    "accuracy": ("accuracy", "{:+.1f}", SMALL),
    "worst family": ("worst_family", "{:+.1f}", 0.0),
    "JSD": ("jsd", "{:+.4f}", 0.0),
    "retention PPL": ("retention_ppl", "{:+,.2f}", 0.0),
    "gradient norm": ("grad_norm_95", "{:+.3f}", 0.0),
    "step time": ("step_of_sft", "ratio", 0.0),
}

BUDGET = {"star-no-agreement": 0.0, "budget-10": 0.1, "budget-25": 0.25, "budget-50": 0.5, "unisd-star": 1.0}
KINDS = {  # what a row is -> rows, colour, marker
    "baseline": ("sft sft-worked ssd sdft gkd opsd".split(), INK[1], "s"),
    "plain self-distillation": (["sd"], "black", "D"),
    "one mechanism": ("agree-token agree-seq ema contrast match match-repr clip".split(), INK[0], "o"),
    "UniSD*": (["unisd-star"], INK[2], "*"),
    "as the official code has it": (["official-agree-seq", "official-star"], INK[3], "v"),
    "UniSD*, contexts for a share": (list(BUDGET)[1:4], INK[4], "^"),
}


# --- numbers -> verdicts: +1 yes, 0 cannot tell, -1 no; so "and" is the minimum and "or" the maximum


@dataclass(frozen=True)
class Gap:
    """A difference paired by seed: mean, half of its 95 % interval, over how many seeds, and how it is printed."""

    name: str
    mean: float
    half: float
    n: int
    form: str = "{:+.1f}"

    def above(self, sign: int, floor: float, small: float) -> int:
        """+1: all of sign x interval is above floor. -1: all of it is at most floor + small, no advantage worth the name."""
        low, high = sign * self.mean - self.half, sign * self.mean + self.half
        return 0 if self.n < MIN_SEEDS else 1 if low > floor else -1 if high <= floor + small else 0

    def __str__(self) -> str:
        if not self.n:
            return f"{self.name} missing"
        if self.form == "ratio":
            low, mid, high = (f"{math.exp(x):.2f}" for x in (self.mean - self.half, self.mean, self.mean + self.half))
            return f"{self.name} {mid} [{low}, {high}] ({self.n})" if self.n > 1 else f"{self.name} {mid} (1)"
        half = f" ± {self.form.replace('+', '').format(self.half)}" if self.n > 1 else ""
        return f"{self.name} {self.form.format(self.mean).replace('-', '−')}{half} ({self.n})"


def gap(rows: dict, a: str, b: str, value, name: str = "", form: str = "{:+.1f}") -> Gap:
    """Row a minus row b over the seeds that both have. value: a run's numbers -> a number, nan where it has none."""
    both = sorted(rows.get(a, {}).keys() & rows.get(b, {}).keys())
    values = [d for s in both if (d := value(rows[a][s]) - value(rows[b][s])) == d]
    return Gap(name or b, *study.spread(values), len(values), form)


def condition(rule: str, rows: dict) -> tuple[int, str]:
    """'accuracy: ema > sd clip' -> does it hold (+1, 0, -1), and the numbers that say so."""
    metric, rest = rule.strip().split(": ")
    me, sign, *others = rest.split()
    if metric == "every family":
        families = next((list(c["by_task"]) for c in rows.get(me, {}).values()), ["families"])
        gaps = [gap(rows, me, others[0], lambda c, f=f: c["by_task"].get(f, math.nan), f) for f in families]
        small, head = 0.0, f"`{me}` − `{others[0]}`: "
    else:
        key, form, small = METRICS[metric]
        value = lambda c: math.log(c[key]) if form == "ratio" else c.get(key, math.nan)
        gaps = [gap(rows, me, b, value, form=form) for b in others]
        head = f"{metric}, `{me}` {'/' if form == 'ratio' else '−'} "
    times, room = (math.log(float(sign[1:])), math.log(FACTOR)) if sign[0] == "×" else (0.0, 0.0)
    bounds = {  # direction, floor, and what is too small to count
        ">": [(1, 0.0, small)],
        "<": [(-1, 0.0, small)],
        "≥": [(1, -CLOSE, 0.0)],
        "~": [(1, -CLOSE, 0.0), (-1, -CLOSE, 0.0)],
        "×": [(1, times - room, 0.0), (-1, -times - room, 0.0)],
    }[sign[0]]
    return min(g.above(*b) for g in gaps for b in bounds), head + ", ".join(map(str, gaps))


def judge(rule: str, rows: dict) -> tuple[int, str]:
    """A whole rule -> +1, 0 or -1, and its numbers (those of its first alternative: the others have the same)."""
    ways = [[condition(c, rows) for c in way.split(";")] for way in rule.split("|")]
    return max(min(t for t, _ in way) for way in ways), "<br>".join(text for _, text in ways[0])


def page(found: dict, figures: list[str]) -> str:
    """claims.md: rules and verdicts per setting; outside the clean one, only claims about which there is a number."""
    lines = [INTRO]
    for setting, rows in found.items():
        for title, claims, words in (
            ("the paper's claims", PAPER, ("cannot tell", "reproduced", "not reproduced")),
            ("this project's own", OURS, ("cannot tell", "holds", "does not hold")),
        ):
            table = []
            for claim, rule in re.findall(r"(.+?)\s+:: (.+)", claims):
                truth, said = judge(rule, rows)
                if setting == "clean" or re.search(r"\(\d+\)", said):
                    rule = rule.replace(" | ", ", or ").replace(" ; ", "; ")
                    table.append(f"| {claim} | `{rule}` | {said} | **{words[truth]}** |")
            flags = " ".join(study.SETTINGS.get(setting, ())) or "no extra flags"
            head = [f"## {setting} (`{flags}`): {title}", "", "| claim | rule | here | verdict |", "|---|---|---|---|"]
            lines += [*head, *table, ""] if table else []
    return "\n".join(lines + [f"![{n}](figures/{n}.png)\n" for n in figures])


INTRO = f"""# The paper's claims, and what this miniature shows

A miniature can say whether a mechanism, computed as its equation says, moves a small model in the reported direction, in a
world where every answer can be checked. It cannot confirm or refute the paper at its own scale: there, models of 0.5 to 8
billion parameters learn from benchmarks; here one of 0.9 million learns five procedural families, with settings not tuned per
row. Intervals cover the training seed only, not base model, world and questions, nor the number of comparisons.

Numbers: mean difference paired by seed ± half of its 95 % interval (Student's t), in brackets how many seeds both rows have;
accuracy in points, JSD in nats, step times as a mean ratio. *Gradient norm*: its 95 % quantile after warm-up. *Worst family*:
the change of the family that does worst against `sd`. Rules for the interval of a − b: `a > b` above 0, refuted if all of it
is below {SMALL:g} (accuracy) or 0 (else); `a ≥ b` above −{CLOSE:g}; `a ~ b` within ±{CLOSE:g}; `×5.4` within a factor {FACTOR:g}.
All comparisons of a rule must hold, one refuted decides; all else, and fewer than {MIN_SEEDS} seeds, is "cannot tell".
"""


# --- numbers -> figures; (n) is the number of seeds

STYLE = {"figure.constrained_layout.use": True, "figure.titlesize": 10, "axes.titlesize": 9, "legend.fontsize": 8}
STYLE |= {"axes.grid": True, "grid.alpha": 0.25, "lines.markersize": 5, "savefig.dpi": 100, "xtick.labelsize": 8}
HALO = withStroke(linewidth=2, foreground="white")
ticks = lambda: dict(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())


def average(cells: dict, key: str) -> tuple[float, float]:
    """Mean over the seeds and its bar: half of the 95 % interval, 0 from too few seeds."""
    mean, half = study.spread(c[key] for c in cells.values())
    return mean, half if len(cells) >= MIN_SEEDS else 0.0


def label(axis, names: dict[str, tuple[float, float]]) -> None:
    """Each name at the first place around its point where it covers no other name and no point."""
    axis.figure.canvas.draw()  # only now are sizes known
    spot = {n: axis.transData.transform(at) for n, at in names.items()}
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in spot.values()]
    turns = [k * math.pi / 8 for k in (1, 15, 7, 9, 3, 13, 5, 11, 0, 8, 2, 14, 6, 10, 4, 12)]
    places = [(r * math.cos(t), r * math.sin(t)) for r in range(12, 160, 8) for t in turns]
    for n in sorted(names, key=lambda n: -spot[n][1]):
        probe = axis.text(0, 0, n, fontsize=8)
        (w, h), _ = probe.get_window_extent().size, probe.remove()
        for x, y in places:
            box = Bbox.from_bounds(spot[n][0] + x - w * (x < 0), spot[n][1] + y - h / 2, w, h)
            if axis.bbox.contains(*box.min) and axis.bbox.contains(*box.max) and not box.count_overlaps(taken):
                break
        taken.append(box)
        line = dict(arrowstyle="-", color="0.5", lw=0.5 * (math.hypot(x, y) > 20))
        how = dict(textcoords="offset pixels", ha="right" if x < 0 else "left", va="center", fontsize=8)
        axis.annotate(n, names[n], (x, y), arrowprops=line, path_effects=[HALO], **how)


def legend(of, axis, **where) -> None:
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))  # one of each kind
    of.legend(handles.values(), handles, **where)


def scatter(found: dict, setting: str, key: str, unit: str):
    """Accuracy against drift ("jsd") or cost ("step_of_sft"); where most rows are close together, once more from near."""
    rows, at = found.get(setting, {}), {}
    for n in (m for members, *_ in KINDS.values() for m in members if m in rows):
        (x, half), (y, bar) = average(rows[n], key), average(rows[n], "accuracy")
        x, low, high = study.times_sft(rows, n) if key == "step_of_sft" else (x, x - half, x + half)
        at |= {n: (x, y, [[x - low], [high - x]], bar)} if x > 0 else {}
    if len(at) < 3:
        return None
    # The crowd: within a factor 2 of the median drift, or 14 points of the median accuracy.
    place = {n: math.log2(x) if key == "jsd" else y / 14 for n, (x, y, *_) in at.items()}
    crowd = {n: a for n, a in at.items() if abs(place[n] - statistics.median(place.values())) < 1}
    both = [at, crowd] if 3 <= len(crowd) < len(at) else [at]
    figure, axes = plt.subplots(1, len(both), figsize=(9, 4.8), squeeze=False)
    for axis, shown in zip(axes[0], both, strict=True):
        for kind, (members, colour, marker) in KINDS.items():
            for x, y, across, up in (shown[m] for m in members if m in shown):
                how = dict(fmt=marker, color=colour, ms=6 + 5 * (marker == "*"), elinewidth=0.8, label=kind)
                axis.errorbar(x, y, up, across, **how)
        axis.set(xlabel=unit, ylabel="held-out accuracy, per cent", xmargin=0.13, ymargin=0.13)
        if shown is not at:  # the bar of one row must not push all others together
            means = [y for _, y, *_ in shown.values()]
            axis.set_ylim(min(means) - 6, max(means) + 6)
        if shown is at or key != "jsd":
            axis.set_xscale("log")
            axis.xaxis.set(**ticks())
    for level, name, style in (("before", "base", "--"), ("ceiling", "base with the reference", ":")):
        height = statistics.mean(c[level] for r in rows.values() for c in r.values())
        axes[0][0].axhline(height, color="0.4", ls=style, lw=1, label=name)
    legend(figure, axes[0][0], loc="outside lower center", ncols=4)
    figure.suptitle(f"{setting} references: mean and 95 % interval (seeds)" + ", right: the crowd" * (len(both) - 1))
    for axis, shown in zip(axes[0], both, strict=True):  # a name stands in one of the two
        label(axis, {f"{n} ({len(rows[n])})": at[n][:2] for n in shown if shown is both[-1] or n not in crowd})
    return figure


def curves(found: dict, setting: str):
    """What happens during training: mean over the seeds, band from the lowest to the highest."""
    rows = {n: found.get(setting, {}).get(n, {}) for n in "sft sd agree-token ema unisd-star".split()}
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.6))
    titles = "accuracy without reference: student", "accuracy with reference: teacher", "divergence (mean of 20 steps)"
    for axis, key, title in zip(axes, ("student_accuracy", "teacher_accuracy", "div"), titles, strict=True):
        for colour, n in zip(INK, rows, strict=False):
            also = key if key == "student_accuracy" else "div"  # without a divergence there is no teacher to ask
            runs = [dict(c["curves"][key]) for c in rows[n].values() if c["curves"][key] and c["curves"][also]]
            grid = Counter(map(tuple, runs)).most_common(1)[0][0] if runs else ()  # steps that most seeds measured
            seeds = [[c[x] for x in grid] for c in runs if tuple(c) == grid]
            if across := list(zip(*seeds, strict=True)):
                axis.fill_between(grid, [*map(min, across)], [*map(max, across)], color=colour, alpha=0.2, lw=0)
                axis.plot(grid, [*map(statistics.mean, across)], color=colour, label=f"{n} ({len(seeds)})")
        axis.set(title=title, xlabel="optimizer step", ylabel="nats per token" if key == "div" else "per cent")
    legend(figure, axes[0], loc="outside lower center", ncols=5)
    axes[2].set_yscale("log")
    axes[2].yaxis.set(**ticks())
    figure.suptitle(f"{setting} references: mean over (seeds), band from the lowest to the highest seed")
    return figure if axes[0].lines else plt.close(figure)


def leave_one_out(found: dict):
    """UniSD* without one of its parts, or otherwise changed: accuracy and drift minus those of UniSD*."""
    names = "star-no-ema star-no-agreement star-no-contrast star-no-match star-clip official-star".split()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, key, unit in zip(axes, ("accuracy", "jsd"), ("accuracy, points", "JSD to the base, nats"), strict=True):
        for k, setting in enumerate(("clean", "wrong")):
            for y, n in enumerate(names):
                g = gap(found.get(setting, {}), n, "unisd-star", lambda c, key=key: c[key])
                if g.n >= MIN_SEEDS:
                    axis.errorbar(g.mean, y + k / 4, xerr=g.half, fmt="os"[k], color=INK[k], label=setting)
                    axis.annotate(f"({g.n})", (g.mean, y + k / 4), (5, 2 - 9 * k), textcoords="offset points", size=7)
        axis.axvline(0, color="0.4", lw=1)
        axis.set(xlabel=f"{unit}: row minus UniSD*", yticks=range(len(names)), yticklabels=names, ylim=(5.6, -0.4))
        axis.locator_params(axis="x", nbins=6)
    legend(figure, axes[0], loc="outside lower center", ncols=2)
    figure.suptitle("UniSD* with one thing changed: difference paired by seed, 95 % interval (seeds)")
    return figure if len(axes[0].containers) >= 2 else plt.close(figure)


def budget(found: dict):
    """Accuracy against the share of the answers whose contexts are read, and how they are chosen."""
    settings = [s for s in ("clean", "wrong") if sum(n in found.get(s, {}) for n in BUDGET) >= 3]
    names = BUDGET, {"budget-25-divergence": 0.275}, {"budget-25-random": 0.225}  # both .25, side by side
    ways = list(zip(names, ("by entropy", "by divergence", "at random"), INK, "oDs", strict=False))
    figure, axes = plt.subplots(1, max(1, len(settings)), figsize=(9, 3.6), squeeze=False)
    for axis, setting in zip(axes[0], settings, strict=False):
        for shares, choice, colour, marker in ways:
            there = [(x, len(c), *average(c, "accuracy")) for n, x in shares.items() if (c := found[setting].get(n))]
            axis.plot([x for x, *_ in there], [y for *_, y, _ in there], color=colour, lw=1)
            for x, n, y, half in there:
                axis.errorbar(x, y, half, fmt=marker, color=colour, capsize=2, label=choice)
                axis.annotate(f"({n})", (x, y + half), (0, 2), textcoords="offset points", ha="center", size=7)
        axis.set(title=setting, xticks=[*BUDGET.values()], ymargin=0.1, ylabel="accuracy, per cent")
        axis.set_xlabel("share of answers with contexts (.25: side by side)")
    legend(figure, axes[0][0], loc="outside lower center", ncols=3)
    figure.suptitle("UniSD* with agreement on a share of the answers only: mean and 95 % interval (seeds)")
    return figure if settings else plt.close(figure)


JSD, COST = "JSD to the base, nats per token", "step time / that of sft (bar: fastest to slowest seed)"
FIGURES = {f"curves-{s}": (curves, s) for s in ("clean", "wrong")}
FIGURES |= {f"drift-{s}": (scatter, s, "jsd", JSD) for s in ("clean", "wrong")}
FIGURES |= {"cost": (scatter, "clean", "step_of_sft", COST), "leave-one-out": (leave_one_out,), "budget": (budget,)}


def write(out: Path) -> list[str]:
    """<out>/figures/*.png and <out>/claims.md from what study.read finds there. -> the figures there was enough data for."""
    found, drawn, folder = study.read(out), [], out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, (draw, *how) in FIGURES.items():
            (folder / f"{name}.png").unlink(missing_ok=True)  # an earlier one would show what is no longer there
            if figure := draw(found, *how):
                figure.savefig(folder / f"{name}.png")
                plt.close(figure)
                drawn.append(name)
    (out / "claims.md").write_text(page(found, drawn))
    return drawn


def main(argv: list[str] | None = None) -> None:
    """Figures and the page of claims from the runs of a study."""
    parser = argparse.ArgumentParser(prog="report.py", description=main.__doc__)
    parser.add_argument("out", nargs="?", default="runs/study", help="the study's --out (default: %(default)s)")
    out = Path(parser.parse_args(argv).out)
    print(f"{', '.join(write(out)) or 'no figures'} and claims.md -> {out}")


if __name__ == "__main__":
    main()
