"""break_it.py - break a run on purpose, and draw the plot that betrays it: the figures of docs/troubleshooting.md.

    python -m experiments.break_it                 all runs, then all figures
    python -m experiments.break_it --only good lr  some runs; a finished run is kept, so the rest can follow later

The idea: short runs of the tiny model (seed 0), each with one thing wrong, beside one in which it is right. Two things are kept
that log.jsonl does not have: how the student's *held-out* answers end, and the weights of single tokens. It exists so that
docs/troubleshooting.md shows the signs of a broken run as they were measured, not as one would expect them.   Depends on train.py
"""

import argparse
import io
import json
import shutil
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from PIL import Image

import train
from engine import metrics
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
CLIP, EMA, LIVE, NATS = "clip at 0.05 nats", "EMA 0.5 every step", "live teacher, reverse KL, T 2", "nats per token"
PLOTS = {  # figure -> {key of a log row: label of the y axis}, {run: label}
    "length": ({"length": "sample length, tokens"}, {"good": "good", "live": LIVE}),
    "entropy": ({"entropy": f"entropy, {NATS}"}, {"good": "good", "clip": CLIP, "fast": EMA}),
    "eos": ({"held_out_eos": "answers that end, per cent"}, {"sft": "SFT, right mask", "sft-pad": "SFT, mask by pad id"}),
    "teacher": ({"teacher_accuracy": "teacher accuracy, per cent"}, {"slow": "EMA 0.98 every 10 steps", "fast": EMA}),
    "gradient": ({"grad_norm": "gradient norm"}, {"good": "good, lr 1e-3", "lr": "lr 3e-2"}),
    "divergence": ({"loss": f"loss, {NATS}", "div": f"div, {NATS}"}, {"good": "good", "clip": CLIP, "live": LIVE}),
    "weights": ({"weights": "tokens of the last step"}, {"gamma": "gamma 1", "gamma100": "gamma 100"}),
}


def train_once(name: str, out: Path, steps: int) -> dict:
    """One run -> {"rows": its log with the held-out endings, "weights": of the last step, "after": accuracy and more}."""
    file, folder = out / f"{name}.json", out / name
    if file.exists():
        return json.loads(file.read_text())
    held_out_eos, weights = [], []
    measure, weigh_step, write_answers = metrics.measure, train.weigh_step, train.write_answers

    def keep_endings(lm, task, examples, with_reference=False, *options):
        result = measure(lm, task, examples, with_reference, *options)
        held_out_eos.extend([] if with_reference else [result["eos"]])
        return result

    def keep_weights(reader, *options):
        result = weigh_step(reader, *options)
        weights[:] = result[0].reliability[reader.batch.mask.bool()].tolist()
        return result

    def mask_by_pad(run, *options):
        """The mask of `ids != pad`, for a model whose pad token is its end token: the end itself is masked."""
        ids, mask = write_answers(run, *options)
        return ids, mask * ~torch.isin(ids, torch.tensor(run.lm.eos))

    recipe, overrides = RUNS[name]
    shutil.rmtree(folder, ignore_errors=True)
    answers = mask_by_pad if name.endswith("pad") else write_answers
    with patch.object(metrics, "measure", keep_endings):
        with patch.multiple(train, weigh_step=keep_weights, write_answers=answers):
            after = train.main(make(recipe, steps=steps, out=str(folder), **(SMALL | overrides)))["after"]
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    # The model alone is measured twice (in and out of distribution) before the first step, and twice after the last.
    for row, eos in zip([row for row in rows if "student_accuracy" in row], held_out_eos[2:-2], strict=True):
        row["held_out_eos"] = eos
    found = {"rows": rows, "weights": weights, "after": after}
    file.write_text(json.dumps(found))
    return found


def draw(found: dict[str, dict], folder: Path) -> list[str]:
    """Every figure whose runs are there. -> their names"""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name, (_, labels) in PLOTS.items() if labels.keys() <= found.keys()]
    for name in names:
        keys, labels = PLOTS[name]
        figure = Figure(figsize=(5.6 if len(keys) == 1 else 8, 3.4), layout="constrained")
        for axis, (key, label) in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys.items(), strict=True):
            if key == "weights":
                weights = [found[run][key] for run in labels]
                axis.hist(weights, bins=25, range=(0, 1), label=labels.values(), color=INK[: len(labels)])
                axis.set(xlabel="agreement weight of a token", ylabel=label, yscale="log")
            else:  # colour, dash and marker differ, so that curves can be told apart in grey too
                axis.set_prop_cycle(color=INK[:3], linestyle=["-", "--", ":"], marker=list("os^"))
                for run, text in labels.items():
                    points = [(row["step"], row[key]) for row in found[run]["rows"] if row.get(key) is not None]
                    axis.plot(*zip(*points, strict=True), label=text, lw=1.6, ms=4, markevery=max(1, len(points) // 6))
                axis.grid(alpha=0.25)
                scale = dict(yscale="log") if name == "divergence" else dict(ylim=(0, 1.08 * axis.dataLim.y1))
                axis.set(xlabel="optimizer step", ylabel=label, **scale)
            axis.legend(fontsize=8)
        pixels = io.BytesIO()
        figure.savefig(pixels, dpi=90)
        Image.open(pixels).convert("RGB").quantize(64).save(folder / f"{name}.png", optimize=True)  # a third of the size
    return names


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, draw the figures, print the table."""
    look = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(description=main.__doc__, **look)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="runs")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run, at least 10")
    parser.add_argument("--out", default="runs/break", help="where the runs are kept")
    parser.add_argument("--figures", default=str(FIGURES), help="where the figures go")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    found = {name: train_once(name, Path(args.out), args.steps) for name in args.only}
    print("figures:", ", ".join(draw(found, Path(args.figures))) or "none (their runs are not all there)")
    keys = ("accuracy", "eos", "length", "jsd_to_base")
    print("| run | " + " | ".join(keys) + " |\n|---" + "|---" * len(keys) + "|")
    for name, run in found.items():
        print(f"| {name} | " + " | ".join(f"{run['after'][key]:.3g}" for key in keys) + " |")


if __name__ == "__main__":
    main()
