"""bench.py - what things cost: memory and time, side by side in one run.

    python -m experiments.bench --json bench/here.json                     all sections, tables on the screen
    python -m experiments.bench --sections loss --threads 2                only one

  loss       memory and time of the loss at a real vocabulary, against the plain formula, and against Liger's and TRL's
             where those packages are installed (they are optional)
  sampling   rows that leave the batch when they have ended, against `generate` for the whole batch: tokens per second,
             share of wasted positions, same greedy tokens or not
  scoring    passes under a token budget: padding and time
  steps      a training step of every recipe, split into its parts, against SFT
  model      the same for a model of the shape of Qwen2.5-0.5B with random weights (needs a CUDA device; a small shape
             shows on a CPU that it runs)

Times are medians of `--repeats` after a warm-up; those that are compared are taken in turns, so that a busy machine slows
all of them. Memory on a GPU is the allocator's peak; on a CPU it is counted operation by operation (`Live`).
Depends on most other files; nothing depends on it.   Try it:  python -m pytest tests/test_bench.py -q
"""

import argparse
import io
import json
import platform
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers

from engine import any_console, sampling
from engine.build import Run, start
from engine.config import make
from engine.head import head_of
from engine.reading import PackedReader
from engine.rollout import choose_device, generate
from experiments.bench_loss import bench_loss, medians
from experiments.bench_model import NAMES, bench_model, step_rows
from unisd import Batch, score_teachers

# --- sampling and scoring -----------------------------------------------------------------------------------------------


def tiny_run(recipe: str, folder: str, **more) -> Run:
    """The default job, ready to step."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        out = Path(tempfile.mkdtemp(dir=folder))
        return start(make(recipe, out=str(out), eval_size=1, teacher_every=0, sample_every=0, **more), out)


def bench_sampling(device: torch.device, args) -> list[dict]:
    """Rows that leave against the whole batch, greedy (equal tokens?) and at temperature 1 (how much is wasted?)."""
    with tempfile.TemporaryDirectory() as folder:
        run = tiny_run("sd", folder, device=str(device), train_size=200)
    prompts = [run.prompts[i]["student"] for i in run.usable[: args.prompts]]
    noise = torch.rand(len(prompts), 40, generator=torch.Generator().manual_seed(0))
    lm = replace(run.lm, sample_batch=len(prompts))

    def answers(temperature: float, whole_batch: bool, tally: dict | None = None) -> torch.Tensor:
        (sampling.WHOLE_BATCH.add if whole_batch else sampling.WHOLE_BATCH.discard)(lm.model)
        return generate(lm, prompts, 40, temperature, noise, tally)[0]

    ways = {"rows leave": False, "whole batch": True}
    seconds = medians({way: partial(answers, 1.0, whole) for way, whole in ways.items()}, args.repeats, device)
    rows = []
    for way, whole in ways.items():
        answers(1.0, whole, tally := {})
        rows.append(
            {
                "way": way,
                "prompts": len(prompts),
                "tokens / s": round(tally["written"] / seconds[way]),
                "wasted positions": round(1 - tally["written"] / tally["decoded"], 3),
                "greedy tokens equal": answers(0.0, whole).equal(answers(0.0, not whole)),
                "time / rows leave": round(seconds[way] / seconds["rows leave"], 2),
            }
        )
    return rows


def bench_scoring(device: torch.device, args) -> list[dict]:
    """Teacher, negative and contexts of one step under several token budgets: padding, and time."""
    with tempfile.TemporaryDirectory() as folder:
        run = tiny_run("unisd-star", folder, device=str(device), train_size=200)
    p = [run.prompts[i] for i in run.usable[:48]]
    ids, mask = generate(run.lm, [x["student"] for x in p], 40, 1.0)
    contexts = [[x["contexts"][k] for x in p] for k in range(3)]
    batch = Batch([x["student"] for x in p], [x["teacher"] for x in p], [x["negative"] for x in p], contexts, ids, mask)

    def score(budget: int, tally: dict | None = None) -> None:
        with run.teacher():
            reader = PackedReader(run.lm.model, head_of(run.lm.model, run.lm.vocab), batch, budget, run.cfg.chunk, tally)
            score_teachers(reader, batch, run.cfg)

    budgets = [256, 1024, 4096, 16384]
    seconds = medians({f"{b}": lambda b=b: score(b) for b in budgets}, args.repeats, device)
    rows = []
    for b in budgets:
        tally: dict = {}
        score(b, tally)
        share = round(1 - tally["read"] / tally["padded"], 3)
        rows.append({"tokens per pass": b, "padding": share, "time / largest": round(seconds[f"{b}"] / seconds["16384"], 2)})
    whole = sum(max(len(x) for x in s) + ids.shape[1] for s in (batch.teacher, batch.negative, *contexts)) * len(p)
    rows.append({"tokens per pass": "each reading padded to its longest", "padding": round(1 - tally["read"] / whole, 3)})
    return rows


# --- whole steps --------------------------------------------------------------------------------------------------------


def bench_steps(device: torch.device, args) -> list[dict]:
    """The default job under every recipe."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {n: tiny_run(r, folder, device=str(device), train_size=480, **more) for n, (r, more) in NAMES.items()}
        return step_rows(runs, args.repeats, device)


SECTIONS = {"loss": bench_loss, "sampling": bench_sampling, "scoring": bench_scoring, "steps": bench_steps, "model": bench_model}


def markdown(rows: list[dict]) -> str:
    """A list of rows as a table."""
    columns = list(dict.fromkeys(k for r in rows for k in r))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(r.get(c, "")) for c in columns) + " |" for r in rows])


def main(argv: list[str] | None = None) -> int:
    """Measure, print tables, and write them to a file."""
    any_console()
    parser = argparse.ArgumentParser(
        prog="bench.py", description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure")
    parser.add_argument("--json", default="", help="where the numbers go, with the device's name ('' = only the screen)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0 = torch's choice)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements per median, after one warm-up")
    parser.add_argument("--tokens", type=int, default=512, help="loss: N")
    parser.add_argument("--vocab", type=int, default=151_936, help="loss: V")
    parser.add_argument("--prompts", type=int, default=48, help="sampling: prompts in a batch")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, _, reason = choose_device(args.device, "auto")
    where = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "repeats": args.repeats,
    }
    print(reason)
    found: dict = {"where": where}
    for name in args.sections:
        begun = time.perf_counter()
        found[name] = SECTIONS[name](device, args)
        print(f"\n### {name} ({time.perf_counter() - begun:.0f} s)\n\n{markdown(found[name])}")
        if args.json:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
