"""train.py - put it together: sample, score, loss, update, log (Algorithm 1), and a run that survives being killed.

    python train.py                                  the embedded tiny model, a few minutes on a laptop
    python train.py --recipe ema --clip 2.0          any row of the paper's table, any mechanism on top
    python train.py --out runs/mine --resume         go on where a run was stopped

What is the method stands under the five banners in `train`; everything else is plumbing: the run's folder, checkpoints,
tables. `--out` receives log.jsonl (a row a step), curves.png, the trained model as a Hugging Face checkpoint,
summary.json, and checkpoint-<step>/.

Not like the official code: one denominator per optimizer step, so the gradient does not depend on the micro-batch; the
EMA teacher, the data cursor and every random state are in the checkpoint, so a resumed run equals an uninterrupted one
bit for bit. Depends on config, unisd, ema, rollout, data, contexts, tiny, eval, checkpoint.
"""

import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import contexts
import eval as evaluation
import world
from config import SETTINGS, Config, parse
from data import Task, chat_ids, context_message, fit_prompt, teacher_message
from ema import EMA, half_life
from losses import quantile_ceiling
from reading import chunks, head_of, read
from rollout import Loaded, generate, load, turn_end
from unisd import Batch, Targets, divergence_now, score_teachers, unisd_loss
from watch import Watch, curves


@dataclass
class Run:
    """Everything a step needs. Plumbing: built by `start`, saved and restored by checkpoint.py."""

    cfg: Config
    lm: Loaded
    task: Task
    optimizer: torch.optim.Optimizer
    average: EMA | None  # the EMA teacher
    frozen: EMA | None  # the model as it was, an average that is never updated; reloaded, not saved
    step: int = 0
    prompts: dict | None = None  # example index -> its prompts' token ids

    def teacher(self):
        """`with run.teacher():` the model is the teacher."""
        shadow = {"ema": self.average, "frozen": self.frozen, "live": None}[self.cfg.teacher]
        return shadow.applied_to(self.lm.model) if shadow else nullcontext()


def train(run: Run, log, watch: Watch) -> None:
    cfg, model = run.cfg, run.lm.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    while run.step < cfg.steps and not watch.stop:
        # --- 1. sample: the student answers, alone
        # ---------------------------------------------------------------------------------
        clock = Clock(run.lm.device)
        chosen = order(len(run.task.train), cfg.seed, run.step * cfg.batch, cfg.batch)
        p = [prompts_of(run, i) for i in chosen]
        ids, mask = write_answers(run, [x["student"] for x in p], chosen)
        batch = Batch(
            student=[x["student"] for x in p],
            teacher=[x["teacher"] for x in p],
            negative=[x["negative"] for x in p],
            contexts=[[x["contexts"][k] for x in p] for k in range(len(p[0]["contexts"]))],
            ids=ids,
            mask=mask,
        )
        clock.lap("sampling")

        # --- 2. score: the teachers re-read the same tokens (no gradient). Before the student's pass: they borrow its
        # weights --------
        with autocast(run):
            t = score_teachers(model, run.teacher, batch, run.lm.vocab, cfg)
            if cfg.clip_quantile:
                t.ceiling = quantile_ceiling(
                    divergence_now(model, t, run.lm.vocab, cfg, cfg.micro_batch), mask, cfg.clip_quantile
                )
        clock.lap("scoring")

        # --- 3. loss: divergence, weights, contrast, features; micro-batches of one sum (unisd.py)
        # -----------------------------------
        model.train()
        values, loss = [], torch.zeros((), device=run.lm.device)
        for rows in chunks(cfg.batch, cfg.micro_batch):
            with autocast(run):
                states = read(model, batch.student[rows], ids[rows], mask[rows])
                part, each = unisd_loss(states, head_of(model, run.lm.vocab), t.rows(rows), t.head, cfg, t.ceiling)
            part.backward()
            loss += part.detach()
            values.append(each)
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_norm)

        # --- 4. update: AdamW, then, every few steps, the slow teacher
        # ----------------------------------------------------------------
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

        # --- 5. log: one row, now and then a sample, a measurement, a checkpoint
        # ------------------------------------------------------
        row = summarise(run, t, values, loss.item(), norm.item()) | clock.seconds
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


def prompts_of(run: Run, i: int) -> dict:
    """The token ids of every prompt of training example i that the recipe needs; made once, kept."""
    if i not in run.prompts:
        cfg, e, tok, words = run.cfg, run.task.train[i], run.lm.tokenizer, run.task.wording
        student, _ = fit_prompt(tok, lambda _: e.question, "", cfg.max_prompt_tokens)
        with_ref = lambda ref: fit_prompt(
            tok, lambda r: teacher_message(words, e.question, r), ref, cfg.max_prompt_tokens
        )[0]
        shown = (
            contexts.random_demos(run.task.train, i, cfg.contexts, cfg.demos, cfg.seed) if cfg.uses_agreement else []
        )
        run.prompts[i] = {
            "student": student,
            "teacher": with_ref(e.reference) if cfg.uses_teacher else [],
            "negative": with_ref(e.negative) if cfg.w_contrast else [],
            "contexts": [chat_ids(tok, context_message(words, e, demos, with_reference=True)) for demos in shown],
        }
    return run.prompts[i]


def write_answers(run: Run, prompts: list[list[int]], chosen: list[int]) -> tuple[Tensor, Tensor]:
    """The completions of a step: sampled on-policy, sampled from the frozen base (ssd), or the references (sft; a share
    of the steps in gkd).
    """
    cfg, lm = run.cfg, run.lm
    coin = torch.rand((), generator=torch.Generator().manual_seed(cfg.seed * 1_000_003 + run.step)).item()
    if coin < cfg.on_policy:
        writer = run.frozen.applied_to(lm.model) if cfg.sampler == "base" else nullcontext()
        with writer, autocast(run):
            return generate(lm, prompts, cfg.max_new_tokens, cfg.temperature, cfg.sample_batch)
    end = turn_end(lm)
    rows = [run.task.train[i].target or run.task.train[i].reference for i in chosen]
    rows = [lm.tokenizer(r, add_special_tokens=False)["input_ids"][: cfg.max_new_tokens - 1] + [end] for r in rows]
    width = max(map(len, rows))
    ids = torch.tensor([r + [end] * (width - len(r)) for r in rows], device=lm.device)
    return ids, torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=lm.device)


def schedule(step: int, cfg: Config) -> float:
    """Linear warm-up, then cosine to 0. A factor in (0, 1]."""
    rise = max(1, round(cfg.warmup * cfg.steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, cfg.steps - rise)))


def autocast(run: Run):
    """bf16 matmuls on fp32 master weights, where chosen; nothing otherwise."""
    return torch.autocast(run.lm.device.type, dtype=torch.bfloat16, enabled=run.cfg.dtype == "bf16")


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


def summarise(run: Run, t: Targets, values: list[dict], loss: float, norm: float) -> dict:
    """One row of log.jsonl. Means are over the step's unmasked tokens; each key is explained in the README."""
    mean = {k: torch.cat([v[k] for v in values]).mean().item() for k in values[0]}
    m, lengths = t.batch.mask.bool(), t.batch.mask.sum(1)
    row = {"step": run.step, "loss": loss, **mean, "grad_norm": norm, "lr": run.optimizer.param_groups[0]["lr"]}
    row["weight"] = t.weights[m].mean().item()
    row["length"] = lengths.float().mean().item()
    row["eos"] = evaluation.ended(run.lm, t.batch.ids, t.batch.mask).float().mean().item()
    if t.ceiling is not None:
        row["clipped"] = (torch.cat([v["div"] for v in values]) > t.ceiling).float().mean().item()
    return row


# --- plumbing: build a run, measure before and after, write it all down
# -------------------------------------------------------------------


def choose_device(cfg: Config) -> tuple[torch.device, str]:
    """Device and matmul precision, once, with the reason. Sets cfg.device and cfg.dtype to what was chosen."""
    reason = "given"
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        reason = {"cuda": "a CUDA device is there", "mps": "an Apple GPU is there", "cpu": "no GPU is there"}[
            cfg.device
        ]
    device = torch.device(cfg.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {cfg.device}: no CUDA device is there; use --device cpu or auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    why = "given"
    if cfg.dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        cfg.dtype, why = (
            ("bf16", "the device has it; weights stay fp32") if bf16 else ("fp32", "bf16 would not be faster here")
        )
    return (
        device,
        f"device {device} ({name}: {reason}) | matmul {cfg.dtype} ({why}) | torch {torch.__version__} | seed {cfg.seed}",
    )


def load_task(cfg: Config) -> Task:
    return world.load(cfg.train_size, cfg.eval_size, cfg.wrong_references, cfg.seed)


def start(cfg: Config) -> Run:
    """Load everything, check that it can work, and restore a checkpoint if asked."""
    torch.manual_seed(cfg.seed)
    device, line = choose_device(cfg)
    print(line)
    task = load_task(cfg)
    lm = load(cfg.model, device)
    model = lm.model
    print(
        f"model {lm.name} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters) | "
        f"data {task.name} ({len(task.train)} questions, {task.fingerprint()})"
    )
    if cfg.grad_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=device.type == "cuda"
    )
    average = EMA(model, cfg.ema_decay) if cfg.teacher == "ema" and cfg.uses_teacher else None
    needs_base = (cfg.teacher == "frozen" and cfg.uses_teacher) or cfg.sampler == "base"
    run = Run(cfg, lm, task, optimizer, average, EMA(model, 1.0) if needs_base else None, prompts={})
    if average:
        print(f"EMA teacher: after {half_life(cfg.ema_decay, cfg.ema_every):.0f} steps half of it is new")
    return run


def main(cfg: Config) -> dict:
    """One run from settings to summary. Returns what summary.json holds."""
    begun = time.perf_counter()
    cfg.out = cfg.out or f"runs/{cfg.recipe}-seed{cfg.seed}"
    out = checkpoint.claim(cfg)
    run = start(cfg)
    checkpoint.room_for(out, sum(p.numel() for p in run.lm.model.parameters()))
    before, ceiling, ood = measure_before(run, out)
    checkpoint.write_json(out / SETTINGS, asdict(cfg))
    if cfg.resume:
        checkpoint.restore(run)
        print(f"resumed at step {run.step} of {cfg.steps}")
    with (out / "log.jsonl").open("a") as log, Watch(run) as watch, checkpoint.disk("log.jsonl"):
        train(run, log, watch)
    if run.step < cfg.steps:
        checkpoint.save(run)
        print(f"stopped at step {run.step} of {cfg.steps}; go on with: python train.py --out {out} --resume")
        return {}
    return finish(run, out, before, ceiling, ood, begun)


def measure_before(run: Run, out: Path) -> tuple[dict, dict, dict]:
    """Held-out accuracy of the untouched model: alone, with the reference (the ceiling), and out of distribution."""
    size = run.cfg.max_new_tokens
    known = out / "before.json"  # a resumed run has been there already
    if run.cfg.resume and known.exists():
        return tuple(json.loads(known.read_text()))
    print(f"measuring {len(run.task.test)} held-out questions, alone and with their reference ...")
    measures = [evaluation.measure(run.lm, run.task, run.task.test, with_ref, size) for with_ref in (False, True)]
    measures.append(evaluation.measure(run.lm, run.task, run.task.ood, False, size) if run.task.ood else {})
    checkpoint.write_json(known, measures)
    return tuple(measures)


def finish(run: Run, out: Path, before: dict, ceiling: dict, ood: dict, begun: float) -> dict:
    """Measure again, save the model, the curves and the summary, print the table."""
    cfg, lm, task = run.cfg, run.lm, run.task
    after = evaluation.measure(lm, task, task.test, False, cfg.max_new_tokens) if cfg.steps else before
    ood_after = evaluation.measure(lm, task, task.ood, False, cfg.max_new_tokens) if task.ood and cfg.steps else ood
    moved = evaluation.drift(lm, load(cfg.model, lm.device), task, task.test) if cfg.steps else evaluation.NO_DRIFT
    checkpoint.save_final(run)
    curves(out / "log.jsonl", out / "curves.png", f"{cfg.recipe}, {lm.name.split('/')[-1]}, seed {cfg.seed}")
    pick = lambda m: {k: m[k] for k in ("accuracy", "by_task", "interval", "length", "eos")} if m else {}
    summary = {"model": lm.name, "recipe": cfg.recipe, "seed": cfg.seed, "steps": run.step}
    summary |= {"seconds": round(time.perf_counter() - begun, 1), "before": pick(before), "after": pick(after) | moved}
    summary |= {
        "ceiling": pick(ceiling),
        "ood": {"before": pick(ood), "after": pick(ood_after)},
        "data": task.fingerprint(),
    }
    checkpoint.write_json(out / "summary.json", summary)
    print("\n" + evaluation.table({"before": before, "after": after, "ceiling (base with reference)": ceiling}))
    if ood:
        print("\nout of distribution\n" + evaluation.table({"before": ood, "after": ood_after}))
    print(
        f"\nmean held-out accuracy {before['accuracy']:.1f} -> {after['accuracy']:.1f} "
        f"(ceiling {ceiling['accuracy']:.1f}) | JSD to base {moved['jsd_to_base']:.4f} nats | "
        f"retention PPL {moved['retention_ppl']:.2f} | {summary['seconds']:.0f} s | {out}"
    )
    return summary


def cli(argv: list[str] | None = None) -> int:
    """`python train.py ...`: one clear line instead of a traceback for everything a user can mend."""
    try:
        main(parse(argv))
    except (ValueError, RuntimeError, FloatingPointError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
