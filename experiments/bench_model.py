"""bench_model.py - what a training step costs, part by part, on any model: instruments, and a model of a real shape.

What: `step_rows` takes steps of several runs in turns and sets each beside SFT. `bench_model` does it for a model of the
shape of Qwen2.5-0.5B with random weights (prompt 512, answer 256, batch 16) on a GPU, with peak memory and model FLOP
utilisation: operations of the update (6 per weight and token) over what the card could do in that time. On a CPU a small
shape shows that it runs.

Depends on train.py and what it is made of.   Try it:  python -m experiments.bench --sections model
"""

import io
import json
import statistics

import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

import train
from engine.build import Run, assemble
from engine.config import RECIPES, make
from engine.rollout import Loaded

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # bf16 operations per second, by the vendor
BUDGET = {"unisd-star, budget 0.25": ("unisd-star", {"agreement_budget": 0.25})}
NAMES = {r: (r, {}) for r in RECIPES if r not in ("raw", "privileged")} | BUDGET


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
            round(last["length"] * runs[name].cfg.batch / median[name]["sampling"]) if last.get("wasted") is not None else "–"
        )
        row |= {"wasted": round(last.get("wasted", 0.0), 3), "padding": round(last.get("padding", 0.0), 3)}
        if peaks:
            row["peak GiB"] = round(peaks[name] / 2**30, 1)
        table.append(row)
    return table


def shaped_model(device: torch.device, big: bool) -> Qwen2ForCausalLM:
    """A model of Qwen2.5-0.5B's shape (or, not big, a small one) with random weights."""
    shape = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, vocab_size=151936)
    if not big:
        shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=1200)
    torch.manual_seed(0)
    config = Qwen2Config(**shape, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True)
    with torch.device(device):
        return Qwen2ForCausalLM(config).eval()


def shaped_run(recipe: str, device: torch.device, big: bool, **more) -> Run:
    """A run on such a model and random prompts: no task."""
    prompt, completion, batch = (512, 256, 16) if big else (24, 8, 4)
    model = shaped_model(device, big)
    cfg = make(
        recipe, preset="tiny", device=str(device), dtype="bf16" if device.type == "cuda" else "fp32", batch=batch,
        micro_batch=4, max_new_tokens=completion, max_tokens_per_pass=16384, sample_batch=64, steps=1, lr=1e-6, **more,
    )  # fmt: skip
    lm = Loaded(model, Speechless(), [0], model.config.vocab_size, "random weights", dtype=cfg.dtype, sample_batch=64)
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
    run = assemble(cfg, lm, None)
    run.prompts, run.usable = prompts, list(prompts)
    return run


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
        flops = 6 * (layers * read + run.lm.vocab * run.lm.model.config.hidden_size * run.cfg.batch * run.cfg.max_new_tokens)
        known = [v for k, v in PEAK.items() if big and k in torch.cuda.get_device_name(device)]
        update = row["ms"] * row["update %"] / 100 / 1000
        row["update MFU"] = f"{100 * flops / update / known[0]:.0f} %" if known and update else "not measured"
        rows.append(row)
        del run
    return rows
