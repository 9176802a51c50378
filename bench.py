"""bench.py - what things cost: memory and time, side by side in one run.

    python bench.py --json bench/here.json                     all sections, tables on the screen
    python bench.py --sections loss --threads 2                only one

  loss       memory and time of the loss at a real vocabulary, against the plain formula, and against Liger's and TRL's
             where those packages are installed (they are optional)
  sampling   the engines of sampling.py: tokens per second, share of wasted positions, same greedy tokens or not
  scoring    passes under a token budget; shared prefixes against plain re-reading
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
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

import train
from bench_loss import bench_loss, medians
from build import Run, start
from config import RECIPES, make
from ema import EMA
from rollout import Loaded, choose_device, generate
from sampling import ENGINES
from unisd import Batch, score_teachers

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # bf16 operations per second, by the vendor


# --- sampling and scoring -----------------------------------------------------------------------------------------------


def tiny_run(recipe: str, folder: str, **more) -> Run:
    """The default job, ready to step."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        out = Path(tempfile.mkdtemp(dir=folder))
        return start(make(recipe, out=str(out), eval_size=1, teacher_every=0, sample_every=0, **more), out)


def bench_sampling(device: torch.device, args) -> list[dict]:
    """Every engine on the same prompts, greedy (are the tokens equal?) and at temperature 1 (what does it waste?)."""
    with tempfile.TemporaryDirectory() as folder:
        run = tiny_run("sd", folder, device=str(device), train_size=200)
    prompts = [run.prompts[i]["student"] for i in run.usable[: args.prompts]]
    noise = torch.rand(len(prompts), 40, generator=torch.Generator().manual_seed(0))
    reference, _ = generate(run.lm, prompts, 40, 0.0)
    rows, works = [], {}
    engines = [e for e in ENGINES if e != "continuous" or device.type == "cuda"]  # on a CPU it only proves equality
    for engine in engines:
        lm = replace(run.lm, engine=engine, sample_batch=len(prompts))
        works[engine] = lambda lm=lm: generate(lm, prompts, 40, 1.0, noise)
    seconds = medians(works, args.repeats, device)
    for engine in engines:
        lm, tally = replace(run.lm, engine=engine, sample_batch=len(prompts)), {}
        greedy, _ = generate(lm, prompts, 40, 0.0)
        generate(lm, prompts, 40, 1.0, noise, tally)
        rows.append(
            {
                "engine": engine,
                "prompts": len(prompts),
                "tokens / s": round(tally["written"] / seconds[engine]),
                "wasted positions": round(1 - tally["written"] / tally["decoded"], 3),
                "greedy tokens equal": greedy.equal(reference),
                "time / compact": round(seconds[engine] / seconds["compact"], 2),
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
    score = lambda budget, tally=None: score_teachers(
        run.lm.model, run.teacher, batch, run.lm.vocab, replace(run.cfg, max_tokens_per_pass=budget), tally=tally
    )
    budgets = [256, 1024, 4096, 16384]
    seconds = medians({f"{b}": lambda b=b: score(b) for b in budgets}, args.repeats, device)
    rows = []
    for b in budgets:
        tally: dict = {}
        score(b, tally)
        share = round(1 - tally["read"] / tally["padded"], 3)
        rows.append(
            {"tokens per pass": b, "padding": share, "time / largest": round(seconds[f"{b}"] / seconds["16384"], 2)}
        )
    whole = sum(max(len(x) for x in s) + ids.shape[1] for s in (batch.teacher, batch.negative, *contexts)) * len(p)
    rows.append(
        {"tokens per pass": "each reading padded to its longest", "padding": round(1 - tally["read"] / whole, 3)}
    )
    return rows


# --- whole steps --------------------------------------------------------------------------------------------------------


class Quiet:
    """A watch that shows nothing and never stops."""

    stop = False

    def after_step(self, run, row, batch):
        """Nothing."""


def steps_of(run: Run, n: int) -> list[dict]:
    """n training steps -> their rows of the log."""
    log = io.StringIO()
    run.cfg.steps, run.cfg.save_every = run.step + n, 0
    train.train(run, log, Quiet())
    return [json.loads(line) for line in log.getvalue().splitlines()]


BUDGET = {"unisd-star, budget 0.25": ("unisd-star", {"agreement_budget": 0.25})}
NAMES = {r: (r, {}) for r in RECIPES if r not in ("raw", "privileged")} | BUDGET


def step_rows(runs: dict[str, Run], repeats: int, device: torch.device) -> list[dict]:
    """One warm-up step each, then a step of each in turn; medians of the parts, and of the whole against sft."""
    found: dict[str, list[dict]] = {name: [] for name in runs}
    peaks: dict[str, int] = {}
    for i in tqdm(range(repeats + 1), desc="a step of every recipe", leave=False):
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            rows = steps_of(run, 1)
            if i:
                found[name] += rows
            if device.type == "cuda":
                peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated(device))
    parts = ("sampling", "scoring", "update")
    median = {n: {p: statistics.median(r["s_" + p] for r in rows) for p in parts} for n, rows in found.items()}
    sft = sum(median["sft"].values())
    table = []
    for name in runs:
        total = sum(median[name].values())
        row = {"recipe": name, "time / sft": round(total / sft, 2), "ms": round(1000 * total)}
        row |= {p + " %": round(100 * median[name][p] / total) for p in parts}
        last = found[name][-1]
        row["tokens / s sampled"] = (
            round(last["length"] * runs[name].cfg.batch / median[name]["sampling"])
            if last.get("wasted") is not None
            else "–"
        )
        row |= {"wasted": round(last.get("wasted", 0.0), 3), "padding": round(last.get("padding", 0.0), 3)}
        if peaks:
            row["peak GiB"] = round(peaks[name] / 2**30, 1)
        table.append(row)
    return table


def bench_steps(device: torch.device, args) -> list[dict]:
    """The default job under every recipe."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {n: tiny_run(r, folder, device=str(device), train_size=480, **more) for n, (r, more) in NAMES.items()}
        return step_rows(runs, args.repeats, device)


def shaped_run(recipe: str, device: torch.device, big: bool, **more) -> Run:
    """A model of Qwen2.5-0.5B's shape (or, not big, a small one) with random weights, and random prompts: no task."""
    shape = dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, vocab_size=151936
    )
    if not big:
        shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=1200)
    prompt, completion, batch = (512, 256, 16) if big else (24, 8, 4)
    torch.manual_seed(0)
    config = Qwen2Config(**shape, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).eval()
    cfg = make(
        recipe, preset="tiny", device=str(device), dtype="bf16" if device.type == "cuda" else "fp32", batch=batch,
        micro_batch=4, max_new_tokens=completion, max_tokens_per_pass=16384, sample_batch=64, steps=1, **more,
    )  # fmt: skip
    lm = Loaded(model, Speechless(), [0], shape["vocab_size"], "random weights", dtype=cfg.dtype, sample_batch=64)
    g = torch.Generator().manual_seed(1)
    text = lambda n: torch.randint(1, lm.vocab, (n,), generator=g).tolist()
    prompts = {
        i: {
            "student": text(prompt),
            "teacher": text(prompt + completion // 2),
            "negative": text(prompt + completion // 2),
            "contexts": [text(prompt + completion) for _ in range(cfg.contexts)] if cfg.uses_agreement else [],
            "answer": text(completion),
        }
        for i in range(batch)
    }
    frozen = EMA(model, 1.0) if (cfg.teacher == "frozen" and cfg.uses_teacher) or cfg.sampler == "base" else None
    average = EMA(model, cfg.ema_decay) if cfg.teacher == "ema" and cfg.uses_teacher else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
    return Run(cfg, lm, None, optimizer, average, frozen, prompts=prompts, usable=list(prompts))


class Speechless:
    """Stands where a tokenizer would: nothing is turned into text here."""

    pad_token_id = 0
    eos_token_id = 0

    def apply_chat_template(self, *_, **__):
        return ""

    def __call__(self, *_, **__):
        return {"input_ids": [0]}


def bench_model(device: torch.device, args) -> list[dict]:
    """One recipe at a time (each needs the whole memory): time, parts, peak memory, utilisation of the update."""
    big = device.type == "cuda"
    rows, sft = [], None
    names = ["sft", "sd", "ema", "contrast", "match", "clip", "agree-token", "unisd-star", "unisd-star, budget 0.25"]
    for name in tqdm(names, desc="recipes", leave=False):
        recipe, more = NAMES[name]
        run = shaped_run(recipe, device, big, **more)
        row = step_rows({"sft": run}, args.repeats, device)[0] | {"recipe": name}
        sft = sft or row["ms"]
        row["time / sft"] = round(row["ms"] / sft, 2)
        layers = sum(p.numel() for n, p in run.lm.model.named_parameters() if "embed" not in n)
        read = run.cfg.batch * (len(run.prompts[0]["student"]) + run.cfg.max_new_tokens)
        flops = 6 * (
            layers * read + run.lm.vocab * run.lm.model.config.hidden_size * run.cfg.batch * run.cfg.max_new_tokens
        )
        known = [v for k, v in PEAK.items() if big and k in torch.cuda.get_device_name(device)]
        update = row["ms"] * row["update %"] / 100 / 1000
        row["update MFU"] = f"{100 * flops / update / known[0]:.0f} %" if known and update else "not measured"
        rows.append(row)
        del run
    return rows


SECTIONS = {
    "loss": bench_loss,
    "sampling": bench_sampling,
    "scoring": bench_scoring,
    "steps": bench_steps,
    "model": bench_model,
}


def markdown(rows: list[dict]) -> str:
    """A list of rows as a table."""
    columns = list(dict.fromkeys(k for r in rows for k in r))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(r.get(c, "")) for c in columns) + " |" for r in rows])


def main(argv: list[str] | None = None) -> int:
    """Measure, print tables, and write them to a file."""
    parser = argparse.ArgumentParser(
        prog="bench.py", description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure")
    parser.add_argument(
        "--json", default="", help="where the numbers go, with the device's name ('' = only the screen)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
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
