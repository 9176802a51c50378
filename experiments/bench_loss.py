"""bench_loss.py - what the loss costs at a real vocabulary, beside the plain formula and beside Liger's and TRL's.

What: N tokens through two heads of V = 151,936 words, a divergence, and its gradient. A *unit* is N*V*4 bytes, one fp32
tensor of logits; inputs and the two gradients that every contender must return (states and head) are not counted.
Liger's and TRL's losses run only where those packages are installed; they are no dependency. Here are also the two
instruments of bench.py: `peak_bytes` and `medians`.

Depends on unisd.py, agreement.py, engine/head.py.   Try it:  python -m experiments.bench --sections loss
"""

import importlib
import io
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import agreement
from engine.config import Config
from engine.head import Head, chunked_objective, sampled_logps
from unisd import Tokens, divergence, reliability


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, after every operation: the peak that a CPU's allocator does not tell."""

    def __init__(self):
        super().__init__()
        self.seen: dict = {}
        self.peak = 0

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
        known = {x.untyped_storage()._cdata: (StorageWeakRef(x.untyped_storage()), 0) for x in ours}
        live.seen.update(known)
        work()
    return live.peak


def medians(works: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of each, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in tqdm(range(repeats + 1), desc=", ".join(works), leave=False):
        for name, work in works.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begun = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i:  # the first is the warm-up
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(s) for name, s in seconds.items()}


# --- the loss -----------------------------------------------------------------------------------------------------------


def loss_problem(n: int, v: int, h: int, device: torch.device) -> dict:
    """Random states and heads of a student and its teacher; K = 3 more readings of the same tokens."""
    g = torch.Generator(device=device).manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, device=device)
    weight = rand(v, h) / h**0.5
    return {
        "student": rand(n, h).requires_grad_(),
        "weight": weight.requires_grad_(),
        "teacher": rand(n, h),
        "teacher_weight": weight.detach() + 0.01 * rand(v, h) / h**0.5,
        "contexts": rand(3, n, h),
        "ids": torch.randint(v, (n,), generator=g, device=device),
        "c": torch.full((n,), 1 / n, device=device),
    }


def ours(p: dict, m: Config) -> None:
    """The chunked objective and its gradient; with agreement, the K readings and the weights before it."""
    head, speaker, c = Head(p["weight"], len(p["weight"])), Head(p["teacher_weight"], len(p["weight"])), p["c"]
    if m.uses_agreement:
        readings = torch.stack([sampled_logps(x, p["ids"], speaker, 1.0, m.chunk) for x in p["contexts"]])
        mask = torch.ones(1, len(c), device=c.device)
        c = agreement.coefficients(mask, reliability(readings.unsqueeze(1), mask, m))[0]
    loss, _ = chunked_objective(p["student"], head, p["teacher"], speaker, Tokens(p["ids"], c, c), m, m.chunk)
    loss.backward()


def plain(p: dict, m: Config) -> None:
    """The same as it is usually written: whole log-probabilities, one line per formula."""
    student = (p["student"] @ p["weight"].T).log_softmax(-1)
    c = p["c"]
    with torch.no_grad():
        teacher = (p["teacher"] @ p["teacher_weight"].T).log_softmax(-1)
        if m.uses_agreement:
            readings = (p["contexts"] @ p["teacher_weight"].T).log_softmax(-1)  # (K, N, V)
            readings = readings.gather(-1, p["ids"].expand(3, -1).unsqueeze(-1)).squeeze(-1)
            mask = torch.ones(1, len(c), device=c.device)
            c = agreement.coefficients(mask, reliability(readings.unsqueeze(1), mask, m))[0]
    (c * divergence(student, teacher, p["ids"], m)).sum().backward()


def liger(p: dict, m: Config) -> None:
    """Liger's fused JSD: its beta is the teacher's weight in the mixture, as our alpha."""
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False, chunk_size=64
    )
    loss(p["student"], p["weight"], p["teacher"], p["teacher_weight"], p["ids"]).backward()


def trl(p: dict, m: Config) -> None:
    """TRL's SDFT loss on whole logits; its alpha 0 and 1 are the forward and the reverse KL."""
    full = importlib.import_module("trl.experimental.sdft.loss_utils").compute_full_logit_self_distillation_loss
    with torch.no_grad():
        teacher = p["teacher"] @ p["teacher_weight"].T
    alpha = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}[m.divergence]
    (p["c"] * full(p["student"] @ p["weight"].T, teacher, distillation_alpha=alpha)).sum().backward()


def installed(work: Callable, p: dict, m: Config) -> bool:
    """Does this contender run here?"""
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            work(p, m)
        return True
    except (ImportError, AttributeError, RuntimeError) as error:
        print(f"{work.__name__} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
        return False


def afresh(work: Callable, p: dict, m: Config) -> None:
    """One contender, with no gradient left over from another."""
    p["student"].grad = p["weight"].grad = None
    work(p, m)


def extra_bytes(work: Callable, p: dict, m: Config, device: torch.device) -> int:
    """Its peak beyond the inputs and the two gradients that it must return."""
    peak = peak_bytes(partial(afresh, work, p, m), device, list(p.values()))
    p["student"].grad = p["weight"].grad = None
    return peak - 4 * (p["student"].numel() + p["weight"].numel())


def bench_loss(device: torch.device, args) -> list[dict]:
    """Extra peak memory in units of N*V*4 bytes, beyond inputs and the two gradients; time against the plain formula."""
    n, v, h = args.tokens, args.vocab, 896
    small, p = loss_problem(8, 1000, 32, device), loss_problem(n, v, h, device)
    half = loss_problem(n // 2, v, h, device)
    rows = []
    cases = {d: Config(divergence=d, log_entropy=False) for d in ("forward", "reverse", "jsd")}
    cases["forward, K = 3"] = replace(cases["forward"], agreement="token", gamma=1.0)
    cases["forward, entropy logged"] = replace(cases["forward"], log_entropy=True)
    extra = {f: installed(f, small, cases["jsd"]) for f in (liger, trl)}
    for name, m in cases.items():
        contenders = {"ours": ours, "plain": plain}
        contenders |= {"liger": liger} if name == "jsd" and extra[liger] else {}
        contenders |= {"trl": trl} if name in ("forward", "reverse", "jsd") and extra[trl] else {}
        works, memory = {}, {}
        for who, f in contenders.items():
            works[who] = partial(afresh, f, p, m)
            memory[who] = [extra_bytes(f, q, m, device) for q in (p, half)]
        seconds = medians(works, args.repeats, device)
        for who in contenders:
            whole, at_half = memory[who]
            rows.append(
                {
                    "loss": name,
                    "who": who,
                    "units": round(whole / (4 * n * v), 2),
                    "MB": round(whole / 1e6),
                    "MB at N/2": round(at_half / 1e6),
                    "seconds": round(seconds[who], 3),
                    "time / plain": round(seconds[who] / seconds["plain"], 2),
                }
            )
    return rows
