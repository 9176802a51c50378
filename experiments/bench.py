"""bench.py - what things cost: memory and time, side by side in one run.

    python -m experiments.bench --json bench/here.json            all sections, tables on the screen
    python -m experiments.bench --sections loss --threads 2       only one

  loss    a divergence of N tokens at V = 151,936 words, and its gradient, against the plain formula and (if installed) Liger's;
          memory without inputs and their gradients, in units of N*V*4 bytes: one fp32 tensor of logits
  steps   a training step of the default job under every recipe, split into its parts, against SFT
  model   the same on CUDA in the shape of Qwen2.5-0.5B (prompt 512, answer 256, batch 16), with memory; on a CPU it only runs

Shapes: N tokens, V vocabulary, H hidden size, K = 3 more readings.
Depends on train.py and most other files; nothing depends on it.   Try it:  python -m pytest tests/test_bench.py -q
"""

import argparse
import gc
import io
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import agreement
import train
from engine.build import Run, assemble, start
from engine.checkpoint import command, writable
from engine.config import RECIPES, Config, make
from engine.head import Head, chunked_objective, sampled_logps
from engine.loading import Loaded, choose_device
from tasks.tiny import ASSET
from unisd import Tokens, divergence, reliability

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # bf16 operations per second, by the vendor
PARTS = ("sampling", "scoring", "update")
NAMES = {r: (r, {"agreement_budget": 1.0}) for r in RECIPES if r not in ("raw", "privileged")}  # row -> recipe, overrides
NAMES["unisd-star, budget 0.25"] = ("unisd-star", {"agreement_budget": 0.25})  # the default
MODEL = ("sft", "sd", "unisd-star, budget 0.25", "unisd-star", "agree-token", "match", "ema", "contrast", "clip")  # in that section


# --- instruments -------------------------------------------------------------------------------------------------------
class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, after every operation: the peak that a CPU's allocator does not tell."""

    def __init__(self):
        super().__init__()
        self.seen, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen = {k: v for k, v in self.seen.items() if not v[0].expired()}
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.seen.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.seen.values()))
        return out


def peak_bytes(work: Callable[[], object], device: torch.device, ours: list[Tensor]) -> int:
    """Largest number of bytes that `work` has allocated at a time, beyond what is in `ours` (the inputs)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with Live() as live:
        live.seen |= {x.untyped_storage()._cdata: (StorageWeakRef(x.untyped_storage()), 0) for x in ours}
        work()
    return live.peak


def medians(works: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of each, taken in turns after a warm-up, so that a busy machine slows all of them."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in tqdm(range(repeats + 1), desc=", ".join(works), leave=False):
        for name, work in works.items():
            wait()
            begun = time.perf_counter()
            work()
            wait()
            if i:  # the first is the warm-up
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(s) for name, s in seconds.items()}


# --- the loss ----------------------------------------------------------------------------------------------------------
def loss_problem(n: int, v: int, h: int, device: torch.device) -> dict[str, Tensor]:
    """Random states (N, H) and heads (V, H) of a student and its teacher; K = 3 more readings of the same tokens (K, N, H)."""
    g = torch.Generator(device=device).manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, device=device)
    p = dict(weight=rand(v, h) / h**0.5, student=rand(n, h), teacher=rand(n, h), contexts=rand(3, n, h))
    p["teacher_weight"] = p["weight"] + 0.01 * rand(v, h) / h**0.5
    p |= dict(ids=torch.randint(v, (n,), generator=g, device=device), c=torch.full((n,), 1 / n, device=device))
    return p | {name: p[name].requires_grad_() for name in ("student", "weight")}


def agreed(c: Tensor, readings: Tensor, m: Config) -> Tensor:
    """The tokens' coefficients (N,) after the agreement of the readings' log-probabilities (K, N)."""
    mask = torch.ones(1, len(c), device=c.device)
    return agreement.coefficients(mask, reliability(readings.unsqueeze(1), mask, m))[0]


def ours(p: dict, m: Config) -> None:
    """The chunked objective and its gradient; with agreement, the K readings and the weights before it."""
    head, speaker, c = Head(p["weight"], len(p["weight"])), Head(p["teacher_weight"], len(p["weight"])), p["c"]
    if m.uses_agreement:
        c = agreed(c, torch.stack([sampled_logps(x, p["ids"], speaker, 1.0, m.chunk) for x in p["contexts"]]), m)
    loss, _ = chunked_objective(p["student"], head, p["teacher"], speaker, Tokens(p["ids"], c, c), m, m.chunk)
    loss.backward()


def plain(p: dict, m: Config) -> None:
    """The same as it is usually written: whole log-probabilities, one line per formula."""
    student, c = (p["student"] @ p["weight"].T).log_softmax(-1), p["c"]
    with torch.no_grad():
        teacher = (p["teacher"] @ p["teacher_weight"].T).log_softmax(-1)
        if m.uses_agreement:
            readings = (p["contexts"] @ p["teacher_weight"].T).log_softmax(-1)  # (K, N, V)
            c = agreed(c, readings.gather(-1, p["ids"].expand(3, -1).unsqueeze(-1)).squeeze(-1), m)
    (c * divergence(student, teacher, p["ids"], m)).sum().backward()


def liger(p: dict, m: Config) -> None:
    """Liger's fused JSD: its beta is the teacher's weight in the mixture, as our alpha."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False, chunk_size=64)
    loss(p["student"], p["weight"], p["teacher"], p["teacher_weight"], p["ids"]).backward()


def once(work: Callable, p: dict, m: Config) -> None:
    """One contender, whose gradients are gone when it is done."""
    work(p, m)
    p["student"].grad = p["weight"].grad = None


def bench_loss(device: torch.device, tokens: int = 512, vocab: int = 151_936, hidden: int = 896, repeats: int = 5) -> list[dict]:
    """Extra peak memory in units of N*V*4 bytes, and time against the plain formula: a row for each loss and contender."""
    problems = {n: loss_problem(n, vocab, hidden, device) for n in (tokens, tokens // 2)}
    peak = lambda work, n, m: peak_bytes(partial(once, work, problems[n], m), device, [*problems[n].values()])
    cases = {d: Config(divergence=d, log_entropy=False) for d in ("forward", "reverse", "jsd")}
    cases["forward, K = 3"] = replace(cases["forward"], agreement="token", gamma=1.0)
    cases["forward, entropy logged"] = replace(cases["forward"], log_entropy=True)
    rows = []
    for name, m in cases.items():
        contenders = {"ours": ours, "plain": plain}
        if name == "jsd":
            try:
                liger(loss_problem(8, 1000, 32, device), m)
                contenders["liger"] = liger
            except (ImportError, RuntimeError) as error:
                print(f"liger is left out: {str(error).splitlines()[0]}")
        seconds = medians({who: partial(once, f, problems[tokens], m) for who, f in contenders.items()}, repeats, device)
        for who, f in contenders.items():
            whole, half = (peak(f, n, m) - 4 * hidden * (n + vocab) for n in problems)
            row = {"loss": name, "who": who, "units": round(whole / (4 * tokens * vocab), 2), "MB": round(whole / 1e6)}
            row |= {"MB at N/2": round(half / 1e6), "seconds": round(seconds[who], 3)}
            rows.append(row | {"time / plain": round(seconds[who] / seconds["plain"], 2)})
    return rows


# --- steps -------------------------------------------------------------------------------------------------------------
def one_step(run: Run) -> dict:
    """A training step, without a word. -> its row of the log; on CUDA with the peak of memory in bytes"""
    rows, cuda = [], run.lm.device.type == "cuda"
    quiet = SimpleNamespace(stop=False, after_step=lambda run, row, batch: rows.append(row))
    run.cfg.steps, run.cfg.save_every = run.step + 1, 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(run.lm.device)
    train.train(run, io.StringIO(), quiet)
    return rows[0] | ({"peak": torch.cuda.max_memory_allocated(run.lm.device)} if cuda else {})


def utilisation(run: Run, length: float, seconds: float) -> str:
    """Operations of an update (6 per weight and token; the head reads only the answer) over what the card could do meanwhile."""
    cuda = run.lm.device.type == "cuda"
    known = [peak for card, peak in PEAK.items() if cuda and card in torch.cuda.get_device_name(run.lm.device)]
    layers = sum(p.numel() for name, p in run.lm.model.named_parameters() if "embed" not in name)
    prompt = statistics.mean(len(prompts["student"]) for prompts in run.prompts.values())
    operations = 6 * run.cfg.batch * (layers * (prompt + length) + run.lm.vocab * run.lm.model.config.hidden_size * length)
    return f"{100 * operations / seconds / known[0]:.0f} %" if known else "not measured"


def step_row(name: str, run: Run, steps: list[dict]) -> dict:
    """What the log of some steps says: milliseconds and their parts, tokens per second, memory, utilisation."""
    seconds, last = {part: statistics.median(step["s_" + part] for step in steps) for part in PARTS}, steps[-1]
    total, sampled = sum(seconds.values()), last.get("wasted") is not None
    row = {"recipe": name, "time / sft": "–", "ms": round(1000 * total, 1)}
    row |= {f"{part} %": round(100 * seconds[part] / total) for part in PARTS}
    row["tokens / s sampled"] = round(last["length"] * run.cfg.batch / seconds["sampling"]) if sampled else "–"
    row |= {key: round(last.get(key, 0.0), 3) for key in ("wasted", "padding")}
    row |= {"peak GiB": round(max(step["peak"] for step in steps) / 2**30, 1)} if "peak" in last else {}
    return row | {"update MFU": utilisation(run, last["length"], seconds["update"])}


def step_rows(runs: dict[str, Run], repeats: int) -> list[dict]:
    """One warm-up step each, then a step of each in turn. -> a row for each run"""
    found = [{name: one_step(run) for name, run in runs.items()} for _ in tqdm(range(repeats + 1), desc="steps", leave=False)]
    return [step_row(name, run, [turn[name] for turn in found[1:]]) for name, run in runs.items()]


def beside_sft(rows: list[dict]) -> list[dict]:
    """The same rows with their time against that of the row sft, if it is among them."""
    sft = [row["ms"] for row in rows if row["recipe"] == "sft"]
    return [row | {"time / sft": round(row["ms"] / sft[0], 2)} for row in rows] if sft else rows


def bench_steps(device: torch.device, repeats: int = 5) -> list[dict]:
    """The default job under every recipe, in turns."""
    runs, small = {}, dict(device=str(device), train_size=480, eval_size=1, teacher_every=0, sample_every=0)
    with tempfile.TemporaryDirectory() as folder:
        for name, (recipe, more) in NAMES.items():
            out = Path(tempfile.mkdtemp(dir=folder))
            with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
                runs[name] = start(make(recipe, out=str(out), **small, **more), out)
        return beside_sft(step_rows(runs, repeats))


def shaped_model(device: torch.device) -> Qwen2ForCausalLM:
    """A model of Qwen2.5-0.5B's shape (on a CPU, a small one) with random weights."""
    shape = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, vocab_size=151936)
    if device.type != "cuda":
        shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=1200)
    torch.manual_seed(0)
    config = Qwen2Config(**shape, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True)
    with torch.device(device):
        return Qwen2ForCausalLM(config).eval()


def shaped_run(name: str, device: torch.device) -> Run:
    """A run on such a model, one of NAMES, with random prompts: no task, and any tokenizer, as nothing is turned into text."""
    model, (recipe, more) = shaped_model(device), NAMES[name]
    prompt, completion, batch, dtype = (512, 256, 16, "bf16") if device.type == "cuda" else (24, 8, 4, "fp32")
    sizes = dict(batch=batch, micro_batch=4, max_new_tokens=completion, max_tokens_per_pass=16384, sample_batch=64)
    cfg = make(recipe, preset="tiny", device=str(device), dtype=dtype, lr=1e-6, **sizes, **more)
    tokenizer, vocab = AutoTokenizer.from_pretrained(ASSET), model.config.vocab_size
    run = assemble(cfg, Loaded(model, tokenizer, [0], vocab, "random weights", dtype=dtype, sample_batch=64), None)
    g, hinted = torch.Generator().manual_seed(1), prompt + completion // 2
    text = lambda n: torch.randint(1, vocab, (n,), generator=g).tolist()
    for i in range(batch):
        run.prompts[i] = {"student": text(prompt), "teacher": text(hinted), "negative": text(hinted)}
        run.prompts[i]["contexts"] = [text(prompt + completion) for _ in range(cfg.contexts)] if cfg.uses_agreement else []
        run.prompts[i]["answer"] = text(completion)
    run.usable = list(run.prompts)
    return run


def bench_model(device: torch.device, recipes: Iterable[str] = MODEL, repeats: int = 5) -> Iterator[dict]:
    """A model of a real shape under some of NAMES, one after the other: each needs the whole memory."""
    rows: list[dict] = []
    for name in recipes:
        gc.collect()  # the last run
        rows += step_rows({name: shaped_run(name, device)}, repeats)
        yield beside_sft(rows)[-1]


SECTIONS = {  # name -> rows of its table, from the device and the command line
    "loss": lambda device, args: bench_loss(device, args.tokens, args.vocab, repeats=args.repeats),
    "steps": lambda device, args: bench_steps(device, args.repeats),
    "model": lambda device, args: bench_model(device, repeats=args.repeats),
}


def markdown(rows: list[dict]) -> str:
    """Rows with the same keys as a table."""
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


@command("bench.py")
def main(argv: list[str] | None = None) -> int:
    """Measure, print tables, and write them to a file."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure")
    add("--json", default="", help="where the numbers go, with the device's name ('' = only the screen)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--threads", type=int, default=0, help="CPU threads (0 = torch's choice)")
    add("--repeats", type=int, default=5, help="measurements per median, after one warm-up")
    add("--tokens", type=int, default=512, help="loss: N")
    add("--vocab", type=int, default=151_936, help="loss: V")
    args = parser.parse_args(argv)
    if args.json:
        args.json = writable(Path(args.json).parent, "--json") / Path(args.json).name
    device, _, reason = choose_device(args.device, "auto")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    print(reason)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    where = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    found: dict = {"where": where | {"transformers": transformers.__version__, "repeats": args.repeats}}
    for name in args.sections:
        found[name], begun = [], time.perf_counter()
        for row in SECTIONS[name](device, args):
            found[name].append(row)
            if args.json:  # after every row: a run that is cut off has measured something
                args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"\n### {name} ({time.perf_counter() - begun:.0f} s)\n\n{markdown(found[name])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
