"""train.py - put it together: sample, score, loss, update, log (Algorithm 1), and a run that survives being killed.

    python train.py                                  the embedded tiny model, a few minutes on a laptop
    python train.py --recipe ema --clip 2.0          any row of the paper's table, any mechanism on top
    python train.py --out runs/mine --resume         go on where a run was stopped

What is the method stands under the five banners in `train`; everything else is plumbing: the run's folder, checkpoints,
tables. `--out` receives log.jsonl (a row a step), curves.png, the trained model as a Hugging Face checkpoint,
summary.json, and checkpoint-<step>/. What a `run` holds is the dataclass Run in build.py.

Not like the official code: one denominator per optimizer step, so the gradient does not depend on the micro-batch; the
EMA teacher, the data cursor and every random state are in the checkpoint, so a resumed run equals an uninterrupted one
bit for bit.
Several processes: torchrun --nproc-per-node 2 train.py ...  (parallel.py).
Depends on most other files; study.py and bench.py run it.   Try it:  python -m pytest tests/test_train.py -q
"""

import json
import math
import os
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from engine import checkpoint, metrics, parallel, plan
from engine.build import Run, start
from engine.config import SETTINGS, Config, default_out, parse
from engine.parallel import clip_gradients, whole_layers
from engine.reading import chunks, head_of, read
from engine.rollout import generate, right_pad, turn_end
from engine.watch import Watch, after_training, before_training
from losses import quantile_ceiling
from unisd import Batch, Targets, divergence_now, score_teachers, unisd_loss


def train(run: Run, log, watch: Watch) -> None:
    """Algorithm 1, from run.step on. One row of `log` per step; stops early when `watch` says so."""
    cfg, model, ranks = run.cfg, run.lm.model, run.ranks
    parameters = [p for p in model.parameters() if p.requires_grad]
    while run.step < cfg.steps and not ranks.any(watch.stop):
        # --- 1. sample: the student answers, alone -------------------------------------------------------------------
        clock = Clock(run.lm.device)
        everyone = order(len(run.usable), cfg.seed, run.step * cfg.batch, cfg.batch)
        chosen = [run.usable[n] for n in everyone[ranks.share(cfg.batch)]]
        p, tally = [run.prompts[i] for i in chosen], {}
        ids, mask = write_answers(run, p, chosen, tally)
        batch = Batch(
            student=[x["student"] for x in p],
            teacher=[x["teacher"] for x in p],
            negative=[x["negative"] for x in p],
            contexts=[[x["contexts"][k] for x in p] for k in range(len(p[0]["contexts"]))],
            ids=ids,
            mask=mask,
        )
        clock.lap("sampling")

        # --- 2. score: the teachers re-read the same tokens, before the student does: they borrow its weights --------
        with run.lm.autocast():
            t = score_teachers(model, run.teacher, batch, run.lm.vocab, cfg, ranks, tally)
        if cfg.clip_quantile and cfg.w_div:
            with run.lm.autocast():
                now = divergence_now(model, t, run.lm.vocab, cfg, tally)
            t.ceiling = quantile_ceiling(ranks.gather(now), ranks.gather(mask), cfg.clip_quantile)
        clock.lap("scoring")

        # --- 3. loss: divergence, weights, contrast, features; the micro-batches are parts of one sum ----------------
        model.train()
        values, loss = [], torch.zeros((), device=run.lm.device)
        for rows in chunks(len(p), cfg.micro_batch):
            with run.lm.autocast():
                states = read(model, batch.student[rows], ids[rows], mask[rows])
                part, each = unisd_loss(states, head_of(model, run.lm.vocab), t.rows(rows), t.head, cfg, t.ceiling)
            part.backward()
            loss += part.detach()
            values.append(each)
        ranks.sum_gradients(parameters)
        loss, norm = ranks.total(loss), clip_gradients(parameters, cfg.grad_norm)

        # --- 4. update: AdamW, then, every few steps, the slow teacher -----------------------------------------------
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(checkpoint.save_bad_batch(run, batch, loss.item(), norm.item()))
        for group in run.optimizer.param_groups:
            group["lr"] = cfg.lr * schedule(run.step, cfg)
        run.optimizer.step()
        run.optimizer.zero_grad()
        model.eval()
        run.step += 1
        if run.average and run.step % cfg.ema_every == 0:
            run.average.update(model)
        clock.lap("update")

        # --- 5. log: one row, now and then a sample, a measurement, a checkpoint -------------------------------------
        row = summarise(run, t, values, loss.item(), norm.item(), tally) | clock.seconds
        watch.after_step(run, row, batch)
        log.write(json.dumps(row) + "\n")
        log.flush()
        if cfg.save_every and run.step % cfg.save_every == 0 and run.step < cfg.steps:
            checkpoint.save(run)


def order(n: int, seed: int, start: int, count: int) -> list[int]:
    """The `count` example numbers from position `start` on: one shuffled epoch after another. A pure function, so the
    cursor is one number.
    """
    out = []
    while len(out) < count:
        epoch, at = divmod(start + len(out), n)
        g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        out += torch.randperm(n, generator=g)[at : at + count - len(out)].tolist()
    return out


def write_answers(run: Run, prompts: list[dict], chosen: list[int], tally: dict) -> tuple[Tensor, Tensor]:
    """The completions of a step: sampled on-policy, sampled from the frozen base (ssd), or the references (sft; a share
    of the steps in gkd).
    """
    cfg, lm = run.cfg, run.lm
    # The step's randomness is a function of seed and step, drawn for the whole batch: it does not depend on how many
    # processes share it, nor on what happened before.
    dice = torch.Generator().manual_seed(cfg.seed * 1_000_003 + run.step)
    if torch.rand((), generator=dice).item() < cfg.on_policy:
        noise = torch.rand(cfg.batch, cfg.max_new_tokens, generator=dice)[run.ranks.share(cfg.batch)]
        writer = run.frozen.applied_to(lm.model) if cfg.sampler == "base" else nullcontext()
        with writer, whole_layers(lm.model):
            return generate(lm, [x["student"] for x in prompts], cfg.max_new_tokens, cfg.temperature, noise, tally)
    end = turn_end(lm)
    for i, x in zip(chosen, prompts, strict=True):
        if "answer" not in x:
            e = run.task.train[i]
            row = lm.tokenizer(e.target or e.reference, add_special_tokens=False, verbose=False)["input_ids"]
            # A solution that had to be cut does not end where it was cut: it gets no end token, or the student learns
            # to stop half way.
            x["answer"] = [*row, end] if len(row) < cfg.max_new_tokens else row[: cfg.max_new_tokens]
    return right_pad([x["answer"] for x in prompts], lm.device, fill=end)


def schedule(step: int, cfg: Config) -> float:
    """Linear warm-up, then cosine to 0. A factor in (0, 1]."""
    rise = max(1, round(cfg.warmup * cfg.steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, cfg.steps - rise)))


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


def summarise(run: Run, t: Targets, values: list[dict], loss: float, norm: float, tally: dict) -> dict:
    """One row of log.jsonl. Means are over the unmasked tokens of the whole step, on every rank; each key is explained in
    the README.
    """
    m = t.batch.mask.bool()
    tokens = {k: torch.cat([v[k] for v in values]) for k in values[0]} | {"weight": t.weights[m]}
    if t.ceiling is not None:
        tokens["clipped"] = tokens["div"] > t.ceiling
    sequences = {"length": t.batch.mask.sum(1), "eos": metrics.ended(run.lm, t.batch.ids, t.batch.mask)}
    counted = {k: torch.tensor(float(v)) for k, v in tally.items()}
    sums = [m.sum(), torch.tensor(len(m)), *(v.sum() for v in (tokens | sequences | counted).values())]
    n, b, *sums = run.ranks.total(torch.stack([s.cpu().double() for s in sums])).tolist()
    row = {"step": run.step, "loss": loss, "grad_norm": norm, "lr": run.optimizer.param_groups[0]["lr"]}
    for k, s in zip(tokens | sequences | counted, sums, strict=True):
        row[k] = s / n if k in tokens else s / b if k in sequences else int(s)
    if "decoded" in row:
        row["wasted"] = 1 - row.pop("written") / row.pop("decoded")
    if "padded" in row:
        row["padding"] = 1 - row.pop("read") / row.pop("padded")
    return row


# --- plumbing: measure before and after, write it all down -----------------------------------------------------------


def main(cfg: Config) -> dict:
    """One run from settings to summary. Returns what summary.json holds."""
    begun = time.perf_counter()
    if cfg.dry_run:
        print(plan.describe(cfg))
        return {}
    cfg.out = default_out(cfg)
    parallel.join()
    rank = parallel.rank()
    out = Path(cfg.out) if rank else checkpoint.claim(cfg)
    parallel.ranks().wait()
    if cfg.resume and (out / "summary.json").exists():
        print(
            f"{out} is finished; its numbers are in {out / 'summary.json'}; to train on: --model {out} and another --out"
        )
        return json.loads((out / "summary.json").read_text())
    run = start(cfg, out)
    checkpoint.write_json(out / SETTINGS, asdict(cfg))
    before = before_training(run, out)
    if cfg.resume:
        checkpoint.restore(run)
        print(f"resumed at step {run.step} of {cfg.steps}")
    with (
        (Path(os.devnull) if rank else out / "log.jsonl").open("a") as log,
        Watch(run) as watch,
        checkpoint.disk("log.jsonl"),
    ):
        train(run, log, watch)
    if run.step < cfg.steps:
        checkpoint.save(run)
        print(f"stopped at step {run.step} of {cfg.steps}; go on with: python train.py --out {out} --resume")
        return {}
    if cfg.steps:
        checkpoint.save(run)  # what follows is long, and may run out of memory
    return after_training(run, out, before, begun)


OUT_OF_MEMORY = (
    "the device is out of memory; the last checkpoint is whole. Go on with --resume and a lower --micro-batch or "
    "--max-tokens-per-pass or --sample-batch, or with --grad-checkpointing (none changes the result)"
)


OTHERS_GONE = (
    "another process of this run ended, or cannot be reached any more ({}): its own message, if it left one, says why. The last "
    "checkpoint, if one was written, is whole: go on with the same torchrun command and --resume, under any number of processes"
)


def cli(argv: list[str] | None = None) -> int:
    """`python train.py ...`: one clear line instead of a traceback for everything a user can mend. -> the exit code: 130 for
    a run that was stopped, so that what follows in a script does not take it for finished.
    """
    warnings.formatwarning = lambda message, *_, **__: f"train.py: {message}\n"
    try:
        with parallel.one_voice():
            cfg = parse(argv)
            return 0 if main(cfg) or cfg.dry_run else 130
    except KeyboardInterrupt:
        print("train.py: stopped; go on with --resume, or start again if it had not begun to measure", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        print(f"train.py: {OUT_OF_MEMORY}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # torch's own for a lost process is one, and gloo raises the plain class
        if not parallel.lost(error):
            raise
        print(f"train.py: {OTHERS_GONE.format(str(error).splitlines()[0])}", file=sys.stderr)
        return 3
    except (ValueError, FloatingPointError, checkpoint.DiskFull) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli())
