"""metrics.py - is it better, and did it forget? The numbers behind eval.py and behind every run's before and after.

What: greedy accuracy on held-out questions with 95 % Wilson intervals; the *ceiling*, which is the same model with the reference in
its prompt and the first number to look at; paired differences of two models on the same questions; the perplexity of the gold
solutions; and how far a model has drifted from the one it started as:

    jsd_to_base     mean JSD (alpha .5) of the two models over the tokens of the base's own greedy answers, in nats
    retention_ppl   the base's perplexity on the tuned model's answers: does it still write what the base finds likely?
    reverse_ppl     the tuned model's perplexity on the base's answers: does it still find likely what the base wrote?

A perplexity is exp(- mean log-prob per token), over all tokens of all answers. A model that learns *has* to move away from its
base's wrong answers: drift is read beside the accuracy it bought. Answers are kept in a cache, by weights and sampling.

Depends on losses.py, reading.py, data.py, rollout.py, parallel.py.   Try it:  python -m pytest tests/test_metrics.py -q
"""

import hashlib
import json
import math
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

import losses
from engine.head import chunks, each_token, head_of, sampled_logps
from engine.loading import Loaded, same_language
from engine.parallel import whole_layers
from engine.pretrained import speaks_world
from engine.reading import passes
from engine.rollout import decode, generate, right_pad, turn_end
from tasks.data import Example, Task, chat_ids, fit_prompt, teacher_message, text_ids
from unisd import read

CHUNK, BUDGET = 256, 16384  # tokens per application of the head, tokens per pass: bound memory, never change a result


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share, in per cent; unlike the normal one it stays inside 0-100 and is right at 0 and 100 %."""
    if n == 0:
        return 0.0, 100.0
    p, zz = correct / n, z * z / n
    middle, half = (p + zz / 2) / (1 + zz), z * math.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def that_fit(lm: Loaded, examples: Sequence[Example], limit: int) -> list[Example]:
    """The questions that leave room for an answer of `limit` tokens in the model's context. Warns of those that are left out."""
    room = lm.context - limit
    kept = [e for e in examples if len(chat_ids(lm.tokenizer, e.question)) <= room]
    if len(kept) < len(examples):
        first = next(e for e in examples if e not in kept)
        out = f"{len(examples) - len(kept)} of {len(examples)} held-out questions are left out, first {first.question[:40]!r}"
        warnings.warn(f"{out}: longer than the {room} tokens that the context leaves beside --max-new-tokens {limit}", stacklevel=2)
    return kept


def warn_of_foreign_words(lm: Loaded, task: Task) -> None:
    """A model of the tiny world knows a few hundred words. Say so where it is given other text, and name a model for it."""
    if task.name == "tiny" or not speaks_world(lm.name):
        return
    from tasks.tiny import lesson  # what builds such models: no other run needs it

    words, rng = (lambda text: re.findall(r"[^\W\d_]+", text)), random.Random(0)
    known = {word for _ in range(500) for text in lesson(rng) for word in words(text)}
    asked = [word for e in task.test[:200] for word in words(f"{e.question} {e.reference}")]
    share = 100 * sum(word not in known for word in asked) / max(1, len(asked))
    told = f"the tiny model has never met {share:.0f} per cent of the words of {task.name}; its own world is all it knows"
    warnings.warn(f"{told}: use --model SmolLM2-135M, or Qwen2.5-0.5B, for other text", stacklevel=2)


def prompts_for(lm: Loaded, task: Task, examples: Sequence[Example], with_reference: bool, limit: int) -> list[list[int]]:
    """Evaluation prompts: the question alone, or with its right reference (the ceiling), which is cut where it would not fit."""
    build = lambda e: (lambda r: teacher_message(task.wording, e.question, r)) if with_reference else (lambda _: e.question)
    return [fit_prompt(lm.tokenizer, build(e), e.reference if with_reference else "", lm.context - limit)[0] for e in examples]


def measure(lm: Loaded, task: Task, examples: Sequence[Example], with_reference=False, limit=0, cache: Path | None = None) -> dict:
    """Greedy accuracy and what the answers look like. Shares are in per cent.

    -> {"accuracy": mean over families, "by_task", "interval", "abstained", "length" (tokens), "eos" (ended by itself), "n",
    "scored": how many of them can be, "correct": one bool per example, "texts": the answers, "extra": per family, the mean of
    every further number of the scorer}. A family without answers cannot be scored: None in "by_task", and in "accuracy" if there
    is no other.
    """
    limit = limit or task.max_new_tokens
    ids, mask = answers(lm, prompts_for(lm, task, examples, with_reference, limit), limit, cache)
    texts = decode(lm, ids, mask)
    results = task.score(examples, texts)
    families = dict.fromkeys(e.task for e in examples)
    per_family = {f: [r for e, r in zip(examples, results, strict=True) if e.task == f] for f in families}
    scored = {e.task for e in examples if e.answer is not None}
    mean = lambda rs, name: 100 * sum(float(r[name]) for r in rs) / len(rs)
    more = lambda r: [k for k, v in r.items() if isinstance(v, bool | int | float) and k not in ("correct", "abstained")]
    by_task = {f: mean(rs, "correct") if f in scored else None for f, rs in per_family.items()}
    return {
        "accuracy": sum(by_task[f] for f in scored) / len(scored) if scored else None,
        "by_task": by_task,
        "interval": {f: list(wilson(sum(r["correct"] for r in rs), len(rs))) for f, rs in per_family.items() if f in scored},
        "abstained": mean(results, "abstained"),
        "length": mask.sum(1).float().mean().item(),
        "eos": 100 * ended(lm, ids, mask).float().mean().item(),
        "n": len(examples),
        "scored": sum(len(per_family[f]) for f in scored),
        "correct": [bool(r["correct"]) for r in results],
        "texts": texts,
        "extra": {f: {k: mean(rs, k) for k in more(rs[0])} for f, rs in per_family.items()},
    }


def answers(lm: Loaded, prompts: list[list[int]], limit: int, cache: Path | None = None) -> tuple[Tensor, Tensor]:
    """Greedy answers, from the cache if the very same weights answered the very same prompts before. -> ids, mask (B, T)"""
    if cache is None:
        few = len(prompts) < lm.ranks.size  # then each process answers all
        with whole_layers(lm.model):
            ids, mask = generate(lm, prompts if few else prompts[lm.ranks.share(len(prompts))], limit, temperature=0.0)
        return (ids, mask) if few else (lm.ranks.gather(ids), lm.ranks.gather(mask))
    key = hashlib.sha256(repr((fingerprint(lm), prompts, limit, 0.0, lm.eos, lm.vocab, lm.dtype)).encode()).hexdigest()[:24]
    file = cache / f"{key}.pt"
    if file.exists():
        return torch.load(file, map_location=lm.device, weights_only=True)
    found = answers(lm, prompts, limit)
    with suppress(OSError, RuntimeError):  # torch's own for a full disk: what is not kept is written again, no more than that
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(tuple(x.cpu() for x in found), file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
    return found


def fingerprint(lm: Loaded) -> str:
    """A hash of all weights: two checkpoints of one run, or one folder written twice, never share a cached answer."""
    # Anew each time. Torch's own count of writes (p._version) would say when that is needed, but on CUDA the fused AdamW
    # writes without counting: a trained model was given the answers of the untrained one.
    digest = hashlib.sha256(lm.name.encode())
    for name, p in lm.model.state_dict().items():
        digest.update(name.encode() + p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def answer_rows(examples: Sequence[Example], columns: dict[str, dict]) -> list[dict]:
    """A row per question for answers.jsonl: what was answered to it, and whether that was right. columns: {name: of measure}"""
    rows = []
    for i, e in enumerate(examples):
        row = {"family": e.task, "question": e.question, "reference": e.reference}
        for name, found in columns.items():
            row |= {name: found["texts"][i], f"{name}_correct": found["correct"][i] if e.answer is not None else None}
        rows.append(row)
    return rows


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """One JSON object per line, in UTF-8."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def paired(a: Sequence[bool], b: Sequence[bool]) -> dict:
    """How much better `a` is than `b` on the same questions, in points, with the 95 % interval of a mean of paired differences
    (less wide than two separate ones); how many questions each wins alone. Raises ValueError if lengths differ.
    """
    d = [int(x) - int(y) for x, y in zip(a, b, strict=True)]
    n = len(d)
    mean = sum(d) / n
    half = 1.96 * math.sqrt(max(0.0, sum((x - mean) ** 2 for x in d) / max(1, n - 1)) / n)
    interval = [100 * (mean - half), 100 * (mean + half)]
    return {"difference": 100 * mean, "interval": interval, "wins": d.count(1), "losses": d.count(-1)}


def ended(lm: Loaded, ids: Tensor, mask: Tensor) -> Tensor:
    """Which answers stopped by themselves. (B, T), (B, T) -> (B,) bool."""
    last = ids.gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0)).squeeze(1)
    return torch.isin(last, torch.tensor(lm.eos, device=ids.device)) & (mask.sum(1) > 0)


@torch.no_grad()
def drift(tuned: Loaded, base: Loaded, task: Task, examples: Sequence[Example], limit: int = 0, cache: Path | None = None) -> dict:
    """How far `tuned` is from `base` (see the top of the file). Raises ValueError if their tokens or prompts differ."""
    same_language(tuned, base)
    limit = limit or task.max_new_tokens
    prompts = prompts_for(tuned, task, examples, False, limit)
    said = answers(base, prompts, limit, cache)
    own = said if tuned is base else answers(tuned, prompts, limit, cache)
    jsd, reverse = token_jsd(tuned, base, prompts, *said), perplexity(tuned, prompts, *said)
    return {"jsd_to_base": jsd, "retention_ppl": perplexity(base, prompts, *own), "reverse_ppl": reverse}


def gold_ppl(lm: Loaded, task: Task, examples: Sequence[Example]) -> float:
    """Perplexity of the gold solutions (an example's target, or its reference), asked without them."""
    prompts = prompts_for(lm, task, examples, False, limit=1)
    rows = [[*text_ids(lm.tokenizer, e.target or e.reference), turn_end(lm)] for e in examples]
    rows = [row[: max(1, lm.context - len(p))] for row, p in zip(rows, prompts, strict=True)]
    return perplexity(lm, prompts, *right_pad(rows, lm.device))


def read_answers(lm: Loaded, prompts: list[list[int]], ids: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Given answers, similar lengths together. -> for each group its n tokens (n,) and the final states before them (n, H)"""
    lm.model.eval()
    for rows in passes([len(p) + n for p, n in zip(prompts, mask.sum(1).tolist(), strict=True)], BUDGET):
        with lm.autocast():
            states = read(lm.model, [prompts[i] for i in rows], ids[rows], mask[rows])
        yield ids[rows][mask[rows].bool()], states


@torch.no_grad()
def mean_entropy(lm: Loaded, prompts: list[list[int]], ids: Tensor, mask: Tensor) -> float:
    """Mean entropy of the model over the tokens of given answers, in nats."""
    head, entropy = head_of(lm.model, lm.vocab), lambda logps, _: losses.entropy(logps)
    found = (each_token(states, head, 1.0, CHUNK, entropy) for _, states in read_answers(lm, prompts, ids, mask))
    return sum(x.sum().item() for x in found) / mask.sum().item()


@torch.no_grad()
def perplexity(lm: Loaded, prompts: list[list[int]], ids: Tensor, mask: Tensor) -> float:
    """exp(- mean log-prob per token) of given answers."""
    head = head_of(lm.model, lm.vocab)
    found = (sampled_logps(states, said, head, 1.0, CHUNK) for said, states in read_answers(lm, prompts, ids, mask))
    mean = -sum(x.sum().item() for x in found) / mask.sum().item()
    return math.inf if mean > 709 else math.exp(mean)  # of a model that has fallen apart; math.exp would raise


@torch.no_grad()
def token_jsd(a: Loaded, b: Loaded, prompts: list[list[int]], ids: Tensor, mask: Tensor) -> float:
    """Mean JSD per token of given answers, in nats."""
    total = 0.0
    for both in zip(*(read_answers(lm, prompts, ids, mask) for lm in (a, b)), strict=True):
        heads = [head_of(lm.model, lm.vocab).ready(states) for lm, (_, states) in zip((a, b), both, strict=True)]
        for s in chunks(len(both[0][0]), CHUNK):
            logps = [head.logps(head.logits(states[s]), 1.0) for head, (_, states) in zip(heads, both, strict=True)]
            total += losses.jsd(*logps, alpha=0.5).sum().item()
    return max(0.0, total / mask.sum().item())  # rounding may leave a model -1e-8 from itself


def table(columns: dict[str, dict]) -> str:
    """Markdown: a row per family, a column per measurement, each with its 95 % interval."""
    lines = ["| family | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    between = lambda c, f: " [{:.0f}, {:.0f}]".format(*c["interval"][f]) if f in c["interval"] else ""
    for f in next(iter(columns.values()))["by_task"]:
        cells = [f"{percent(c['by_task'][f]):>5}{between(c, f)}" for c in columns.values()]
        lines.append(f"| {f} | " + " | ".join(cells) + " |")
    lines.append("| **mean** | " + " | ".join(f"**{percent(c['accuracy'])}**" for c in columns.values()) + " |")
    return "\n".join(lines)


def percent(accuracy: float | None) -> str:
    """An accuracy as it is printed; None is that of questions without answers."""
    return "not scored" if accuracy is None else f"{accuracy:.1f}"
