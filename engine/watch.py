"""watch.py - what a person sees of a run: a progress bar with an estimate, a sample now and then, curves, and the final table.

It also measures, every so often, the *teacher's* accuracy with the reference and the student's without, on a small
held-out set. That pair of curves tells what an EMA teacher does: a student trained without references can forget how to
use one, and its average forgets with it.

Ctrl-C (or SIGTERM) lets the current step finish, saves, and says how to go on; a second one stops at once.
Depends on metrics.py, checkpoint.py, rollout.py; matplotlib for the curves.
"""

import json
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from engine import checkpoint, metrics
from engine.loading import load
from engine.page import fitted, has_colour, visible
from engine.rollout import decode
from tasks.data import Example

# Colours that stay apart for every kind of colour vision (Okabe and Ito's).
INK = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
PANELS = {  # title, unit -> keys of log.jsonl
    ("loss and its parts", "nats per token (match: squared)"): ("loss", "div", "nll", "contrast", "match"),
    ("held-out accuracy", "per cent"): ("teacher_accuracy", "student_accuracy"),
    ("entropy of the student", "nats per token"): ("entropy",),
    ("answer length", "tokens"): ("length",),
    ("share: ended by itself, clipped, weight", "0 to 1"): ("eos", "clipped", "weight"),
    ("gradient norm", "before scaling"): ("grad_norm",),
}


class Watch:
    """Called once a step. `stop` turns true when the user asked for it."""

    def __init__(self, run, small: int = 20):
        self.run, self.stop, self.before = run, False, {}
        families = list(dict.fromkeys(e.task for e in run.task.test))
        self.held_out = [e for f in families for e in [x for x in run.task.test if x.task == f][:small]]
        look = dict(desc=run.cfg.recipe, unit="step", dynamic_ncols=True, disable=bool(run.ranks.rank))
        self.bar = tqdm(total=run.cfg.steps, initial=run.step, **look)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        self.bar.close()
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def _ask_to_stop(self, number, frame):
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        self.bar.write("stopping after this step (again to stop at once) ...")

    def after_step(self, run, row: dict, batch) -> None:
        """Move the bar; print a sample and measure both accuracies when it is time (they join the row)."""
        self.bar.update()
        self.bar.set_postfix_str("loss={loss:.3f}, len={length:.0f}, eos={eos:.2f}, gnorm={grad_norm:.2f}".format(**row))
        right = lambda shown: metrics.measure(run.lm, run.task, self.held_out, shown, run.cfg.max_new_tokens)["accuracy"]
        if run.cfg.teacher_every and (run.step % run.cfg.teacher_every == 0 or run.step == 1):
            if run.cfg.uses_teacher:
                with run.teacher():
                    row["teacher_accuracy"] = right(True)
            row["student_accuracy"] = right(False)
        if run.cfg.sample_every and run.step % run.cfg.sample_every == 0:
            (example,) = (run.task.train[i] for i in run.usable if run.prompts[i]["student"] is batch.student[0])
            (answer,) = decode(run.lm, batch.ids[:1], batch.mask[:1])
            verdict = run.task.score([example], [answer])[0]["correct"] if example.answer is not None else None
            self.bar.write(sample(run.step, example, answer, verdict, shutil.get_terminal_size().columns))


def sample(step: int, example: Example, answer: str, correct: bool | None, width: int) -> str:
    """A training question, the student's own answer and the reference, a line each and cut to the terminal; green or red."""
    name, code = {True: ("right", "32"), False: ("wrong", "31"), None: ("not scored", "0")}[correct]
    rows = [(f"step {step}", example.question), (name, answer), ("reference", example.reference)]
    kind = getattr(sys.stdout, "encoding", None) or "utf-8"  # what this terminal lacks is a "?", here too: it must end no run
    rows = [(title, visible(" ".join(text.split())).encode(kind, "replace").decode(kind)) for title, text in rows]
    lines = [fitted(f"  {title:<10} {text}", width - 1).rstrip() for title, text in rows]
    if has_colour():
        lines[1] = f"\033[{code}m{lines[1]}\033[0m"
    return "\n".join(lines)


class Clock:
    """Wall seconds of the parts of a step; waits for the device, which works behind the program's back."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}
        self.then = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds["s_" + name], self.then = round(now - self.then, 4), now


def log_row(run, batch, weights, ceiling, values: list[dict], loss: float, norm: float, tally: dict) -> dict:
    """One row of log.jsonl. Means over the whole step's unmasked tokens, of all processes; see docs/run-folder.md."""
    m = batch.mask.bool()
    per_token = {k: torch.cat([v[k] for v in values]) for k in values[0]} | {"weight": weights.reliability[m]}
    if ceiling is not None:
        per_token["clipped"] = per_token["div"] > ceiling
    per_answer = {"length": batch.mask.sum(1), "eos": metrics.ended(run.lm, batch.ids, batch.mask)}
    sums = {k: v.sum() for k, v in (per_token | per_answer).items()} | tally | {"tokens": m.sum(), "answers": len(m)}
    everyone = run.ranks.total(torch.tensor([float(v) for v in sums.values()], dtype=torch.float64)).tolist()
    total = dict(zip(sums, everyone, strict=True))
    row = {"step": run.step, "loss": loss, "grad_norm": norm, "lr": run.optimizer.param_groups[0]["lr"]}
    row |= {k: total[k] / total["tokens"] for k in per_token} | {k: total[k] / total["answers"] for k in per_answer}
    row |= {"wasted": 1 - total["written"] / total["decoded"]} if "decoded" in tally else {}
    return row | ({"padding": 1 - total["read"] / total["padded"]} if "padded" in tally else {})


def curves(log: Path, picture: Path, title: str) -> None:
    """log.jsonl -> a picture with one panel per thing to watch; panels without data are left out."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    shown = {k: keys for k, keys in PANELS.items() if any(r.get(key) is not None for key in keys for r in rows)}
    if not shown:
        return
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(4.2 * across, 2.9 * down), layout="constrained")  # not pyplot's: a server has no screen
    axes = figure.subplots(down, across, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, ((name, unit), keys) in zip(axes.flat, shown.items(), strict=False):
        for colour, key in zip(INK, keys, strict=False):
            points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            if len(points) < 60:
                axis.plot(x, y, color=colour, label=key.replace("_", " "), lw=1.4, marker="o", ms=3)
            else:  # a step is noisy: the mean of the last ten over the steps themselves
                axis.plot(x, y, color=colour, lw=0.7, alpha=0.25)
                means = [sum(y[max(0, i - 9) : i + 1]) / len(y[max(0, i - 9) : i + 1]) for i in range(len(y))]
                axis.plot(x, means, color=colour, label=key.replace("_", " "), lw=1.6)
        axis.set(title=name, xlabel="optimizer step", ylabel=unit)
        axis.grid(alpha=0.25)
        if len(keys) > 1:
            axis.legend(fontsize=8)
    figure.suptitle(title, parse_math=False)  # a folder's name may hold dollars
    figure.savefig(picture, dpi=110)


def bars(rows: dict[str, dict[str, tuple[float, list[float]]]], picture: Path) -> None:
    """{model or base: {task: (accuracy, interval)}} -> a picture: per task a bar of each, with its 95 % interval."""
    columns = list(next(iter(rows.values())))
    figure = Figure(figsize=(1.8 + 1.5 * len(columns), 3.6), layout="constrained")
    axis = figure.subplots()
    for k, (who, cells) in enumerate(rows.items()):
        x = [i + 0.38 * (k - (len(rows) - 1) / 2) for i in range(len(columns))]
        y, (low, high) = [cells[c][0] for c in columns], ([cells[c][1][end] for c in columns] for end in (0, 1))
        spread = [[max(0.0, a - b) for a, b in zip(y, low, strict=True)], [max(0.0, b - a) for a, b in zip(y, high, strict=True)]]
        axis.bar(x, y, 0.36, yerr=spread, capsize=3, color=("#999999", INK[0])[k + 2 - len(rows)], label=who)
    axis.set_xticks(range(len(columns)), [c.replace(" (", "\n(") for c in columns])
    axis.set(ylabel="accuracy, per cent", ylim=(0, 105), title="held-out accuracy, greedy, 95 % intervals")
    axis.legend()
    figure.savefig(picture, dpi=120)


def kept_answers(run, out: Path) -> Path | None:
    """Where the held-out answers of this run are kept while it runs: accuracy and drift are measured on the same ones."""
    return None if run.ranks.size > 1 else out / ".answers"


def before_training(run, out: Path) -> dict:
    """Held-out accuracy of the untouched model: alone and with the reference (the ceiling), in and out of distribution."""
    known = out / "before.json"  # a resumed run has been there already
    if run.cfg.resume and known.exists():
        return json.loads(known.read_text())
    lm, task, size = run.lm, run.task, run.cfg.max_new_tokens
    print(f"measuring {len(task.test)} held-out questions, alone and with their reference, in answers of up to {size} tokens ...")
    found = {
        "alone": metrics.measure(lm, task, task.test, False, size, kept_answers(run, out)),
        "ceiling": metrics.measure(lm, task, task.test, True, size),
        "ood": metrics.measure(lm, task, task.ood, False, size) if task.ood else {},
        "ood_ceiling": metrics.measure(lm, task, task.ood, True, size) if task.ood else {},
    }
    checkpoint.write_json(known, found)
    alone, shown = found["alone"]["accuracy"], found["ceiling"]["accuracy"]
    if run.cfg.uses_teacher and alone is not None and shown <= alone:
        told = f"with the reference in its prompt the model is right in {shown:.1f} per cent, alone in {alone:.1f}"
        fix = "look at the references, or start from a larger model"
        warnings.warn(f"{told}: a teacher whom the reference does not help has nothing to teach; {fix}", stacklevel=2)
    return found


def after_training(run, out: Path, before: dict, begun: float) -> dict:
    """Measure again, save the model, the curves and the summary, print the table. -> what summary.json holds."""
    cfg, lm, task = run.cfg, run.lm, run.task
    alone, ood, base = before["alone"], before["ood"], lm
    if cfg.privileged:
        alone, ood = before["ceiling"], before["ood_ceiling"]
    if cfg.steps:
        print("measuring again, and the drift from the base ...")
        alone = metrics.measure(lm, task, task.test, cfg.privileged, cfg.max_new_tokens, kept_answers(run, out))
        ood = metrics.measure(lm, task, task.ood, False, cfg.max_new_tokens) if task.ood else {}
        run.optimizer = run.average = run.frozen = None  # their memory is needed for the base beside the trained model
        base = load(cfg.model, lm.device)
        base.dtype, base.sample_batch, base.ranks = lm.dtype, lm.sample_batch, lm.ranks
        base.tokenizer.today = cfg.date  # else a template with the date would be another one than the run's
    # After 0 steps this is the level to compare with.
    moved = metrics.drift(lm, base, task, task.test, cfg.max_new_tokens, kept_answers(run, out))
    checkpoint.save_final(run)
    if not run.ranks.rank:
        with checkpoint.disk("curves.png"):
            curves(out / "log.jsonl", out / "curves.png", f"{cfg.recipe}, {visible(Path(lm.name).name)}, seed {cfg.seed}")
    pick = lambda m: {k: m[k] for k in ("accuracy", "by_task", "interval", "length", "eos") if k in m}
    seconds = round(time.perf_counter() - begun, 1)
    summary = {"model": lm.name, "recipe": cfg.recipe, "seed": cfg.seed, "steps": run.step, "seconds": seconds}
    summary |= {"before": pick(before["alone"]), "after": pick(alone) | moved, "ceiling": pick(before["ceiling"])}
    outside = {"before": pick(before["ood"]), "after": pick(ood), "ceiling": pick(before["ood_ceiling"])}
    summary |= {"ood": outside, "data": task.fingerprint()}
    if not run.ranks.rank:
        rows = metrics.answer_rows(task.test, {"before": before["alone"], "after": alone, "with_reference": before["ceiling"]})
        rows += metrics.answer_rows(task.ood, {"before": before["ood"], "after": ood}) if ood else []
        with checkpoint.disk("answers.jsonl"):
            metrics.write_rows(out / "answers.jsonl", rows)
        checkpoint.write_json(out / "summary.json", summary)  # with it a run counts as finished
        checkpoint.clear(out)
    columns = lambda first, last, top: metrics.table({"before": first, "after": last, "ceiling (base with reference)": top})
    print("\n" + columns(before["alone"], alone, before["ceiling"]))
    if ood:
        print("\nout of distribution\n" + columns(before["ood"], ood, before["ood_ceiling"]))
    print(
        f"\nmean held-out accuracy {metrics.percent(before['alone']['accuracy'])} -> {metrics.percent(alone['accuracy'])} "
        f"(ceiling {metrics.percent(before['ceiling']['accuracy'])}) | JSD to base {moved['jsd_to_base']:.4f} nats | "
        f"retention PPL {moved['retention_ppl']:.2f} | {summary['seconds']:.0f} s | {out}"
    )
    return summary
