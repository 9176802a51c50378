"""train.py - put it together: sample, score, loss, update, log (Algorithm 1), and a run that survives being killed.

    python train.py                                  the embedded tiny model, a few minutes on a laptop
    python train.py --recipe ema --clip 2.0          any row of the paper's table, any mechanism on top
    python train.py --out runs/mine --resume         go on where a run was stopped

What is the method stands under the five banners in `train`; everything else is plumbing: the run's folder, checkpoints,
tables. `--out` receives log.jsonl (a row a step), curves.png, the trained model as a Hugging Face checkpoint,
summary.json, and checkpoint-<step>/.

Not like the official code: one denominator per optimizer step, so the gradient does not depend on the micro-batch; the
EMA teacher, the data cursor and every random state are in the checkpoint, so a resumed run equals an uninterrupted one
bit for bit.
Depends on most other files; only study.py runs it.   Try it:  python -m pytest tests/test_train.py -q
"""

import json
import math
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import benchmarks
import checkpoint
import contexts
import metrics
import plan
import world
from config import DEPARTURES, SETTINGS, Config, default_out, parse
from data import Task, chat_ids
from ema import EMA, half_life
from losses import quantile_ceiling
from reading import check_head, chunks, head_of, read
from rollout import Loaded, choose_device, generate, load, right_pad, turn_end
from unisd import Batch, Targets, divergence_now, score_teachers, unisd_loss
from watch import Watch, after_training, before_training


@dataclass
class Run:
    """Everything a step needs. Plumbing: built by `start`, saved and restored by checkpoint.py."""

    cfg: Config
    lm: Loaded
    task: Task
    optimizer: torch.optim.Optimizer
    average: EMA | None  # the EMA teacher
    frozen: EMA | Loaded | None  # the model as it was: an average never updated, or the adapter switched off; not saved
    step: int = 0
    prompts: dict = field(default_factory=dict)  # example index -> its prompts' token ids, made once

    usable: list = field(default_factory=list)  # the training examples that fit; a step draws from these

    def teacher(self):
        """`with run.teacher():` the model is the teacher."""
        shadow = {"ema": self.average, "frozen": self.frozen, "live": None}[self.cfg.teacher]
        return shadow.applied_to(self.lm.model) if shadow else nullcontext()


def train(run: Run, log, watch: Watch) -> None:
    """Algorithm 1, from run.step on. One row of `log` per step; stops early when `watch` says so."""
    cfg, model = run.cfg, run.lm.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    while run.step < cfg.steps and not watch.stop:
        # --- 1. sample: the student answers, alone -------------------------------------------------------------------
        clock = Clock(run.lm.device)
        chosen = [run.usable[n] for n in order(len(run.usable), cfg.seed, run.step * cfg.batch, cfg.batch)]
        p = [run.prompts[i] for i in chosen]
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

        # --- 2. score: the teachers re-read the same tokens, before the student does: they borrow its weights --------
        with run.lm.autocast():
            t = score_teachers(model, run.teacher, batch, run.lm.vocab, cfg)
        if cfg.clip_quantile and cfg.w_div:
            with (
                run.lm.autocast()
            ):  # its own: autocast remembers casts of weights, and the teacher's are no longer in the model
                t.ceiling = quantile_ceiling(
                    divergence_now(model, t, run.lm.vocab, cfg, cfg.micro_batch), mask, cfg.clip_quantile
                )
        clock.lap("scoring")

        # --- 3. loss: divergence, weights, contrast, features; the micro-batches are parts of one sum ----------------
        model.train()
        values, loss = [], torch.zeros((), device=run.lm.device)
        for rows in chunks(cfg.batch, cfg.micro_batch):
            with run.lm.autocast():
                states = read(model, batch.student[rows], ids[rows], mask[rows])
                part, each = unisd_loss(states, head_of(model, run.lm.vocab), t.rows(rows), t.head, cfg, t.ceiling)
            part.backward()
            loss += part.detach()
            values.append(each)
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_norm or math.inf)

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


def write_answers(run: Run, prompts: list[list[int]], chosen: list[int]) -> tuple[Tensor, Tensor]:
    """The completions of a step: sampled on-policy, sampled from the frozen base (ssd), or the references (sft; a share
    of the steps in gkd).
    """
    cfg, lm = run.cfg, run.lm
    coin = torch.rand((), generator=torch.Generator().manual_seed(cfg.seed * 1_000_003 + run.step)).item()
    if coin < cfg.on_policy:
        writer = run.frozen.applied_to(lm.model) if cfg.sampler == "base" else nullcontext()
        with writer:
            return generate(lm, prompts, cfg.max_new_tokens, cfg.temperature)
    end = turn_end(lm)
    rows = [
        lm.tokenizer(e.target or e.reference, add_special_tokens=False)["input_ids"]
        for e in map(run.task.train.__getitem__, chosen)
    ]
    # A solution that had to be cut does not end where it was cut: it gets no end token, or the student learns to stop
    # half way.
    rows = [r + [end] if len(r) < cfg.max_new_tokens else r[: cfg.max_new_tokens] for r in rows]
    return right_pad(rows, lm.device, fill=end)


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


def summarise(run: Run, t: Targets, values: list[dict], loss: float, norm: float) -> dict:
    """One row of log.jsonl. Means are over the step's unmasked tokens; each key is explained in the README."""
    mean = {k: torch.cat([v[k] for v in values]).mean().item() for k in values[0]}
    m, lengths = t.batch.mask.bool(), t.batch.mask.sum(1)
    row = {"step": run.step, "loss": loss, **mean, "grad_norm": norm, "lr": run.optimizer.param_groups[0]["lr"]}
    row["weight"] = t.weights[m].mean().item()
    row["length"] = lengths.float().mean().item()
    row["eos"] = metrics.ended(run.lm, t.batch.ids, t.batch.mask).float().mean().item()
    if t.ceiling is not None:
        row["clipped"] = (torch.cat([v["div"] for v in values]) > t.ceiling).float().mean().item()
    return row


# --- plumbing: build a run, measure before and after, write it all down ---------------------------------------------


def load_task(cfg: Config) -> tuple[Task, dict]:
    """The tiny world, a benchmark, or a file of the user's -> (Task, what was kept and dropped)."""
    if cfg.data == "tiny":
        return world.load(cfg.train_size, cfg.eval_size, cfg.wrong_references, cfg.seed), {}
    if cfg.wrong_references:
        raise ValueError("--wrong-references works in the tiny world only; set it to 0, or use --data tiny")
    if cfg.data.endswith(".jsonl"):
        task, manifest = benchmarks.load_jsonl(cfg.data, seed=cfg.seed)
        task.train, task.test = task.train[: cfg.train_size or None], task.test[: cfg.eval_size or None]
        return task, manifest
    size = None if cfg.steps == cfg.epochs == 0 else cfg.train_size  # only evaluating: training data is not even read
    # Negatives are made whether the recipe needs them or not: the data and its fingerprint are the same for every
    # recipe.
    negatives = size is not None
    return benchmarks.load_task(cfg.data, train_size=size, test_size=cfg.eval_size, seed=cfg.seed, negatives=negatives)


def start(cfg: Config, out: Path) -> Run:
    """Load everything and check that it can work."""
    torch.manual_seed(cfg.seed)
    device, cfg.dtype, reason = choose_device(cfg.device, cfg.dtype)
    print(f"{reason} | torch {torch.__version__} | seed {cfg.seed}")
    if cfg.preset == "official":
        print("official settings, except:\n  - " + "\n  - ".join(DEPARTURES))
    # Under LoRA nothing of the base is trained: it may lie in bf16. What is trained is always fp32.
    lm = load(cfg.model, device, torch.bfloat16 if cfg.lora_rank and cfg.dtype == "bf16" else torch.float32)
    lm.merge()
    lm.dtype, lm.sample_batch = cfg.dtype, cfg.sample_batch
    lm.train_text_only()
    task, manifest = load_task(cfg)
    model = lm.model
    check_head(model, lm.vocab, chat_ids(lm.tokenizer, "1 + 1"))
    room = lm.context - cfg.max_new_tokens
    if room < 16:
        raise ValueError(
            f"--max-new-tokens {cfg.max_new_tokens} leaves no room in the model's context of {lm.context}: lower it"
        )
    cfg.max_prompt_tokens = min(cfg.max_prompt_tokens, room)
    if cfg.steps == 0 and cfg.epochs:
        cfg.steps = max(1, round(cfg.epochs * len(task.train) / cfg.batch))
    print(
        f"model {lm.name} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters) | "
        f"data {task.name} ({len(task.train)} questions, {task.fingerprint()}) | {cfg.steps} steps of {cfg.batch}"
    )
    needs_base = (cfg.teacher == "frozen" and cfg.uses_teacher) or cfg.sampler == "base"
    frozen = None
    if cfg.lora_rank:
        lm.add_lora(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    if needs_base:
        frozen = lm if lm.adapter else EMA(model, 1.0)  # with an adapter the base is still there: switch it off
    if cfg.grad_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    checkpoint.room_for(out, sum(p.numel() for p in trained))
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=device.type == "cuda")
    average = EMA(model, cfg.ema_decay) if cfg.teacher == "ema" and cfg.uses_teacher else None
    if average:
        print(f"EMA teacher: after {half_life(cfg.ema_decay, cfg.ema_every):.0f} steps half of it is new")
    run = Run(cfg, lm, task, optimizer, average, frozen)
    model.eval()
    if cfg.steps:
        run.prompts, notes = contexts.encode_all(lm.tokenizer, task, cfg, contexts.prepare(lm, task, cfg, out))
        run.usable = list(run.prompts)
        manifest |= notes if manifest else {}
    if manifest:
        checkpoint.write_json(out / "manifest.json", manifest)
    return run


def main(cfg: Config) -> dict:
    """One run from settings to summary. Returns what summary.json holds."""
    begun = time.perf_counter()
    if cfg.dry_run:
        print(plan.describe(cfg))
        return {}
    cfg.out = cfg.out or default_out(cfg.recipe, cfg.seed)
    out = checkpoint.claim(cfg)
    if cfg.resume and (out / "summary.json").exists():
        print(f"{out} is finished; its numbers are in {out / 'summary.json'}")
        return json.loads((out / "summary.json").read_text())
    run = start(cfg, out)
    checkpoint.write_json(out / SETTINGS, asdict(cfg))
    before = before_training(run, out)
    if cfg.resume:
        checkpoint.restore(run)
        print(f"resumed at step {run.step} of {cfg.steps}")
    with (out / "log.jsonl").open("a") as log, Watch(run) as watch, checkpoint.disk("log.jsonl"):
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
    "--max-tokens-per-pass, or with --grad-checkpointing (none changes the result); in a new run, also try a lower --sample-batch"
)


def cli(argv: list[str] | None = None) -> int:
    """`python train.py ...`: one clear line instead of a traceback for everything a user can mend."""
    warnings.formatwarning = lambda message, *_, **__: f"train.py: {message}\n"
    try:
        main(parse(argv))
    except KeyboardInterrupt:
        print("train.py: stopped; go on with --resume, or start again if it had not begun to measure", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        print(f"train.py: {OUT_OF_MEMORY}", file=sys.stderr)
        return 2
    except (ValueError, FloatingPointError, checkpoint.DiskFull) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
