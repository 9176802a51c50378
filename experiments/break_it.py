"""break_it.py - break a run on purpose, and draw the plot that betrays it (the figures of troubleshooting.md).

    python -m experiments.break_it                 all runs, then all figures
    python -m experiments.break_it --only good lr  some runs; a finished run is kept, so the rest can follow later

What: short runs of the tiny model (seed 0), each with one thing wrong, beside one in which it is right. Nothing of the
project is changed: a wrong setting is a setting, and the wrong completion mask is put in the place of the right one for
one run. Beside log.jsonl, what the log does not have is kept: how the student's *held-out* answers end, and the weights
of single tokens.

Depends on train.py.   Read with it: docs/troubleshooting.md
"""

import argparse
import io
import json
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

import train
from engine import metrics, rollout
from engine.config import make
from engine.watch import INK

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SMALL = dict(eval_size=10, train_size=500, teacher_every=10, sample_every=0, save_every=0, device="cpu")
RUNS = {  # name -> recipe, overrides; a name that ends in "pad" runs with the wrong completion mask
    "good": ("sd", {}),
    "lr": ("sd", dict(lr=3e-2)),
    "clip": ("sd", dict(clip=0.05)),
    "live": ("sd", dict(teacher="live", divergence="reverse", temperature=2.0)),
    "slow": ("ema", dict(ema_decay=0.98, ema_every=10)),
    "fast": ("ema", dict(ema_decay=0.5, ema_every=1)),
    "gamma": ("agree-token", dict(gamma=1.0)),
    "gamma100": ("agree-token", dict(gamma=100.0)),
    "sft": ("sft", {}),
    "sft-pad": ("sft", {}),
    "sd-pad": ("sd", {}),
}
PLOTS = {  # file -> label of the y axis, key, {run: label}
    "length": ("sample length, tokens", "length", {"good": "good", "live": "live teacher, reverse KL, T 2"}),
    "entropy": ("entropy, nats per token", "entropy", {"good": "good", "clip": "clip at 0.05 nats", "fast": "EMA 0.5 every step"}),
    "eos": ("answers that end, per cent", "held_out_eos", {"sft": "SFT, right mask", "sft-pad": "SFT, mask by pad id"}),
    "teacher": (
        "teacher accuracy, per cent",
        "teacher_accuracy",
        {"slow": "EMA 0.98 every 10 steps", "fast": "EMA 0.5 every step"},
    ),
    "gradient": ("gradient norm", "grad_norm", {"good": "good, lr 1e-3", "lr": "lr 3e-2"}),
}


@contextmanager
def mask_by_pad():
    """The completion mask of `ids != pad`, for a model whose pad token is its end token: the end itself is masked."""
    mask_of, pad_of = rollout.completion_mask, train.right_pad

    def without_the_end(ids, eos):
        mask = mask_of(ids, eos)
        return mask * ~(rollout.torch.isin(ids, rollout.torch.tensor(eos)))

    def padded(rows, device, fill=0):
        ids, mask = pad_of(rows, device, fill)
        return ids, mask * (ids != fill)

    rollout.completion_mask, train.right_pad = without_the_end, padded
    try:
        yield
    finally:
        rollout.completion_mask, train.right_pad = mask_of, pad_of


@contextmanager
def kept(history: list, weights: list):
    """Keep how the student's held-out answers ended at each measurement, and the last step's weights, token by token."""
    measure, score = metrics.measure, train.score_teachers

    def measured(lm, task, examples, with_reference=False, limit=0, cache=None):
        mask_of, rollout.completion_mask = rollout.completion_mask, RIGHT_MASK  # judged by the right mask, always
        try:
            found = measure(lm, task, examples, with_reference, limit, cache)
        finally:
            rollout.completion_mask = mask_of
        if not with_reference:
            history.append({"held_out_eos": found["eos"], "held_out_length": found["length"]})
        return found

    def scored(model, teacher, batch, *args):
        targets = score(model, teacher, batch, *args)
        weights[:] = targets.weights[batch.mask.bool()].tolist()
        return targets

    metrics.measure, train.score_teachers = measured, scored
    try:
        yield
    finally:
        metrics.measure, train.score_teachers = measure, score


RIGHT_MASK = rollout.completion_mask


def signs(name: str, out: Path, steps: int) -> dict:
    """One run -> {"rows": its log with the held-out endings, "weights": of the last step, "after": accuracy and more}."""
    file = out / f"{name}.json"
    if file.exists():
        return json.loads(file.read_text())
    recipe, overrides = RUNS[name]
    folder, history, weights = out / name, [], []
    shutil.rmtree(folder, ignore_errors=True)
    cfg = make(recipe, steps=steps, out=str(folder), **(SMALL | overrides))
    with kept(history, weights):
        if name.endswith("pad"):
            with mask_by_pad():
                after = train.main(cfg)["after"]
        else:
            after = train.main(cfg)["after"]
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    # The untouched model is measured twice (in and out of distribution) before the first step, and twice after the last.
    for row, found in zip([r for r in rows if "student_accuracy" in r], history[2:-2], strict=True):
        row.update(found)
    found = {"rows": rows, "weights": weights, "after": after | history[-2]}
    file.write_text(json.dumps(found))
    return found


def draw(found: dict[str, dict], folder: Path) -> list[str]:
    """Every figure whose runs are there. -> their names"""
    done = []
    for file, (label, key, runs) in PLOTS.items():
        if runs.keys() <= found.keys():
            figure, axis = panel()
            lines(axis, {text: points(found[run], key) for run, text in runs.items()})
            top = 1.08 * axis.dataLim.y1
            axis.set(xlabel="optimizer step", ylabel=label, ylim=(0, top))
            save(figure, folder, file, done)
    if {"good", "clip", "live"} <= found.keys():
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        texts = {"good": "good", "clip": "clip at 0.05 nats", "live": "live teacher, reverse KL, T 2"}
        for axis, key in zip(figure.subplots(1, 2), ("loss", "div"), strict=True):
            lines(axis, {text: points(found[run], key) for run, text in texts.items()})
            axis.set(xlabel="optimizer step", ylabel=f"{key}, nats per token", yscale="log")
        save(figure, folder, "divergence", done)
    if {"gamma", "gamma100"} <= found.keys():
        figure, axis = panel()
        bins, texts = [i / 25 for i in range(26)], {"gamma": "gamma 1", "gamma100": "gamma 100"}
        axis.hist([found[run]["weights"] for run in texts], bins, label=texts.values(), color=INK[:2])
        axis.set(xlabel="agreement weight of a token", ylabel="tokens of the last step", yscale="log")
        axis.legend()
        save(figure, folder, "weights", done)
    return done


def panel():
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    return figure, figure.subplots()


def points(found: dict, key: str) -> list[tuple]:
    return [(r["step"], r[key]) for r in found["rows"] if r.get(key) is not None]


def lines(axis, curves: dict) -> None:
    """Curves that differ in colour, dash and marker, so that they can be told apart in grey too."""
    for (text, xy), colour, dash, mark in zip(curves.items(), INK, ("-", "--", ":"), "os^", strict=False):
        every = max(1, len(xy) // 6)
        axis.plot(*zip(*xy, strict=True), dash, color=colour, label=text, lw=1.6, marker=mark, ms=4, markevery=every)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)


def save(figure, folder: Path, file: str, done: list) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=90)
    Image.open(pixels).convert("RGB").quantize(64).save(folder / f"{file}.png", optimize=True)  # a third of the size
    done.append(file)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, draw the figures, print the table."""
    parser = argparse.ArgumentParser(
        description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="runs")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run, at least 10")
    parser.add_argument("--out", default="runs/break", help="where the runs are kept")
    parser.add_argument("--figures", default=str(FIGURES), help="where the figures go")
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    found = {name: signs(name, out, args.steps) for name in args.only}
    print("figures:", ", ".join(draw(found, Path(args.figures))) or "none (their runs are not all there)")
    keys = ("accuracy", "held_out_eos", "held_out_length", "jsd_to_base")
    print("| run | " + " | ".join(keys) + " |\n|---" + "|---" * len(keys) + "|")
    for name, f in found.items():
        print(f"| {name} | " + " | ".join(f"{f['after'][k]:.3g}" for k in keys) + " |")


if __name__ == "__main__":
    main()
