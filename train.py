"""train.py - put it together: sample, score, weigh, loss, update, log (Algorithm 1), and a run that survives being killed.

    python train.py                                  the embedded tiny model, a few minutes on a laptop
    python train.py --recipe ema --clip 2.0          any row of the paper's table, any mechanism on top
    python train.py --out runs/mine --resume         go on where a run was stopped
    torchrun --nproc-per-node 2 train.py --out runs/two

What is the method stands under the six banners in `train`; everything else is plumbing: the run's folder, checkpoints,
tables. `--out` receives log.jsonl (a row a step), curves.png, the trained model as a Hugging Face checkpoint,
summary.json, and checkpoint-<step>/. What a `run` holds is the dataclass Run in engine/build.py.

It exists because a method is only understood once one has seen the order of things: the teachers read *before* the student
does, every denominator is known *before* the first backward, and the average moves *after* the update.
Depends on the core and engine/.   Try it:  python -m pytest tests/test_train.py -q
"""

import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from engine import any_console, checkpoint, parallel, plan
from engine.adaptive import divergence_before, least_certain, uncertainty
from engine.build import Run, start
from engine.config import SETTINGS, Config, default_out, parse
from engine.head import chunked_objective, head_of
from engine.parallel import ALONE, Alone, clip_gradients, whole_layers
from engine.reading import PackedReader, token_slices
from engine.rollout import generate, right_pad, turn_end
from engine.watch import Clock, Watch, after_training, before_training, log_row
from losses import quantile_ceiling
from tasks.data import text_ids
from unisd import Batch, Scores, Tokens, Weights, context_readings, read, score_teachers, tokens_of, weigh


def train(run: Run, log, watch: Watch) -> None:
    """Algorithm 1, from run.step on. One row of `log` per step; stops early when `watch` says so."""
    cfg, model, ranks = run.cfg, run.lm.model, run.ranks
    parameters = [p for p in model.parameters() if p.requires_grad]
    while run.step < cfg.steps and not ranks.any(watch.stop):
        # --- 1. sample: the student answers, alone -------------------------------------------------------------------
        clock = Clock(run.lm.device)
        chosen = order(len(run.usable), cfg.seed, run.step * cfg.batch, cfg.batch)
        chosen = [run.usable[n] for n in chosen[ranks.share(cfg.batch)]]  # this process' questions
        p, tally = [run.prompts[i] for i in chosen], {}
        ids, mask = write_answers(run, p, chosen, tally)
        if cfg.micro_batch < len(p):  # a micro-batch is padded to its longest row: similar lengths go together
            rows = sorted(range(len(p)), key=lambda i: len(p[i]["student"]) + int(mask[i].sum()))
            p, ids, mask = [p[i] for i in rows], ids[rows], mask[rows]
        contexts = [list(k) for k in zip(*(x["contexts"] for x in p), strict=True)]
        student, teacher, negative = ([x[name] for x in p] for name in ("student", "teacher", "negative"))
        batch = Batch(student, teacher, negative, contexts, ids, mask)
        clock.lap("sampling")

        # --- 2. score: the teachers re-read the same tokens, before the student does -----------------------------------
        # Until the `with` ends the model's parameters *are* the teacher's (ema.py lends them): nothing of the student may run
        # in here, neither its forward nor its backward. And weights, ceiling and denominators must be known before step 4.
        with run.lm.autocast(), run.teacher():
            # .detach() is a second tensor on the memory that the parameter has *now*, the teacher's. After the `with` the
            # parameter points elsewhere, this one does not: step 4 makes the teacher's log-probs with it.
            head = head_of(model, run.lm.vocab).detach()
            reader = PackedReader(model, head, batch, cfg.max_tokens_per_pass, cfg.chunk, tally)
            scores = score_teachers(reader, batch, cfg, with_contexts=cfg.agreement_budget >= 1)

        # --- 3. weigh: how far each token is trusted, and every denominator ----------------------------------------------
        with run.lm.autocast():
            weights, ceiling = weigh_step(reader, scores, run.teacher, cfg, ranks)
        tokens = tokens_of(batch, scores, weights, ceiling)
        clock.lap("scoring")

        # --- 4. loss: divergence, contrast, features; the micro-batches are parts of one sum -----------------------------
        model.train()
        values, loss, scale = [], tokens.share.new_zeros(()), run.loss_scale()
        for rows, piece in token_slices(mask, cfg.micro_batch):
            with run.lm.autocast():
                states = read(model, batch.student[rows], ids[rows], mask[rows])
                said = None if scores.states is None else scores.states[piece]
                known = scaled(tokens[piece], scale)
                part, each = chunked_objective(states, head_of(model, run.lm.vocab), said, head, known, cfg, cfg.chunk)
            part.backward()
            loss += part.detach() / scale
            values.append(each)
        ranks.sum_gradients(parameters)
        run.scaler.unscale_(run.optimizer)
        loss, norm = ranks.total(loss), clip_gradients(parameters, cfg.grad_norm)

        # --- 5. update: AdamW, then, every few steps, the slow teacher ---------------------------------------------------
        # An overflow of fp16 is no failure: the scaler leaves this update out and halves its scale.
        if not math.isfinite(loss) or not (math.isfinite(norm) or run.may_overflow()):
            raise FloatingPointError(checkpoint.save_bad_batch(run, batch, loss.item(), norm.item()))
        for group in run.optimizer.param_groups:
            group["lr"] = cfg.lr * schedule(run.step, cfg)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        model.eval()
        run.step += 1
        if run.average and run.step % cfg.ema_every == 0:
            run.average.update(model)
        clock.lap("update")

        # --- 6. log: one row, now and then a sample, a measurement, a checkpoint -----------------------------------------
        row = log_row(run, batch, weights, ceiling, values, loss.item(), norm.item(), tally) | clock.seconds
        watch.after_step(run, row, batch)
        log.write(json.dumps(row) + "\n")
        log.flush()
        if cfg.save_every and run.step % cfg.save_every == 0 and run.step < cfg.steps:
            checkpoint.save(run)


def weigh_step(
    reader: PackedReader, scores: Scores, teacher, cfg: Config, ranks: Alone = ALONE
) -> tuple[Weights, Tensor | float | None]:
    """`unisd.weigh` for a step that several processes share. -> this process' Weights, the ceiling of the clip.

    Where all contexts are read: gather mask and contexts, `weigh`, take our rows. The rest serves --agreement-budget (contexts
    for some answers only, UniSD*'s default) and --clip-quantile (a ceiling from the divergences as they are now).
    A quantile, a denominator and "the least certain quarter" are properties of the whole step. So each process' small tensors
    are gathered, the core computes with all of them as if it were alone, and each process takes its own rows of the result.
    `with teacher():` the model is the teacher; used where contexts are read for the least certain only (--agreement-budget).
    """
    batch, contexts, compared, now = reader.batch, scores.contexts, reader.batch.mask, None
    adaptive = cfg.uses_agreement and contexts is None
    if (adaptive and cfg.uncertainty == "divergence") or (cfg.clip_quantile and cfg.w_div):
        now = divergence_before(reader, scores, cfg)
    if adaptive:
        rows = least_certain(uncertainty(reader, scores, cfg, now, ranks), cfg.agreement_budget, ranks)
        with teacher():
            contexts = torch.stack([*reader(context_readings(batch, cfg, rows)).values()])
        compared = torch.zeros_like(batch.mask)
        compared[rows] = batch.mask[rows]
    mask, dtype = ranks.gather(batch.mask), torch.promote_types(next(reader.model.parameters()).dtype, torch.float32)
    if contexts is not None:  # sequences first: it is they that are gathered
        contexts = ranks.gather(contexts.transpose(0, 1)).transpose(0, 1)
    whole = weigh(mask, cfg, contexts, ranks.gather(compared), dtype)
    weights = Weights(**{name: ranks.mine(x, batch.mask) for name, x in vars(whole).items()})
    if cfg.w_div and cfg.clip_quantile:
        return weights, quantile_ceiling(ranks.gather(now), mask, cfg.clip_quantile)
    return weights, cfg.clip if cfg.w_div and cfg.clip else None


def scaled(tokens: Tokens, scale: float) -> Tokens:
    """The same tokens with a larger loss. fp16 keeps nothing below 6e-8, and a token's share of a gradient easily is: so it is
    the *loss* that is scaled, here by its shares, and the gradient is divided again before the update.
    """
    if scale == 1.0:
        return tokens
    return replace(tokens, share=tokens.share * scale, plain_share=tokens.plain_share * scale)


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
    """The completions of a step: sampled on-policy, sampled from the frozen base (ssd), or the references (sft, part of gkd)."""
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
            text = e.demo if cfg.sft_target == "worked" else e.target or e.reference
            row = text_ids(lm.tokenizer, text)
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


# --- plumbing: measure before and after, write it all down -----------------------------------------------------------


def main(cfg: Config) -> dict:
    """One run from settings to summary. Returns what summary.json holds."""
    begun = time.perf_counter()
    any_console()  # for those, too, who call this from Python
    if cfg.dry_run:
        print(plan.describe(cfg))
        return {}
    cfg.out = default_out(cfg)
    parallel.join()
    rank = parallel.rank()
    out = Path(cfg.out) if rank else checkpoint.claim(cfg)
    parallel.ranks().wait()
    if cfg.resume and (out / "summary.json").exists():
        print(f"{out} is finished; its numbers are in {out / 'summary.json'}; to train on: --model {out} and another --out")
        return json.loads((out / "summary.json").read_text())
    run = start(cfg, out)
    checkpoint.write_json(out / SETTINGS, asdict(cfg))
    before = before_training(run, out)
    if cfg.resume:
        checkpoint.restore(run)
        print(f"resumed at step {run.step} of {cfg.steps}")
    # disk() is outermost: on a full disk closing the log raises once more, and that needs the same clear message.
    with checkpoint.disk("log.jsonl"), (Path(os.devnull) if rank else out / "log.jsonl").open("a") as log, Watch(run) as watch:
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


@checkpoint.command("train.py", OUT_OF_MEMORY, "stopped; go on with --resume, or start again if it had not begun to measure")
def cli(argv: list[str] | None = None) -> int:
    """`python train.py ...` -> the exit code"""
    try:
        with parallel.one_voice():
            cfg = parse(argv)
            return 0 if main(cfg) or cfg.dry_run else 130
    except RuntimeError as error:  # torch's own for a lost process is one, and gloo raises the plain class
        if not parallel.lost(error):
            raise
        print(f"train.py: {OTHERS_GONE.format(str(error).splitlines()[0])}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(cli())
