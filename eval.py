"""eval.py - is it better, and did it forget?

What: greedy accuracy on held-out questions per family, with 95 % Wilson intervals; the *ceiling*, which is the same
model with the reference in its prompt and the first number to look at; and how far a model has drifted from the one it
started as:

    jsd_to_base     mean JSD (alpha .5) of the two models over the tokens of the base's own greedy answers, in nats
    retention_ppl   the base's perplexity on the tuned model's answers: does it still write what the base finds likely?
    reverse_ppl     the tuned model's perplexity on the base's answers: does it still find likely what the base wrote?

A perplexity is the mean over answers of exp(-mean log-prob per token). A model that learns *has* to move away from its
base's wrong answers: drift is read beside the accuracy it bought.

    python eval.py --model runs/unisd-star-seed0 --base tiny

Depends on losses.py, unisd.py, data.py, rollout.py, tiny.py.   Try it:  python -m pytest tests/test_eval.py -q
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import losses
import world
from data import Example, Task, chat_ids, teacher_message
from reading import chunks, head_of, passes, read, sampled_logps
from rollout import Loaded, decode, generate, load

NO_DRIFT = {"jsd_to_base": 0.0, "retention_ppl": 1.0, "reverse_ppl": 1.0}


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share, in per cent; unlike the normal one it stays inside 0-100 and is right at 0 and 100 %."""
    if n == 0:
        return 0.0, 100.0
    p, zz = correct / n, z * z / n
    middle, half = (p + zz / 2) / (1 + zz), z * math.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def prompts_for(lm: Loaded, task: Task, examples: Sequence[Example], with_reference: bool) -> list[list[int]]:
    """Evaluation prompts: the question alone, or with its right reference (the ceiling of self-distillation)."""
    message = lambda e: teacher_message(task.wording, e.question, e.reference) if with_reference else e.question
    return [chat_ids(lm.tokenizer, message(e)) for e in examples]


def measure(lm: Loaded, task: Task, examples: Sequence[Example], with_reference: bool = False, limit: int = 0) -> dict:
    """Greedy accuracy. -> {"accuracy": mean over families, "by_task", "interval", "abstained", "length", "eos", "n"},
    shares in per cent.
    """
    ids, mask = generate(
        lm, prompts_for(lm, task, examples, with_reference), limit or task.max_new_tokens, temperature=0.0
    )
    results = task.score(examples, decode(lm, ids, mask))
    families = list(dict.fromkeys(e.task for e in examples))
    hits = {f: [r["correct"] for e, r in zip(examples, results, strict=True) if e.task == f] for f in families}
    by_task = {f: 100 * sum(h) / len(h) for f, h in hits.items()}
    return {
        "accuracy": sum(by_task.values()) / len(by_task),
        "by_task": by_task,
        "interval": {f: list(wilson(sum(h), len(h))) for f, h in hits.items()},
        "abstained": 100 * sum(r["abstained"] for r in results) / len(results),
        "length": mask.sum(1).float().mean().item(),
        "eos": 100 * ended(lm, ids, mask).float().mean().item(),
        "n": len(examples),
    }


def ended(lm: Loaded, ids: Tensor, mask: Tensor) -> Tensor:
    """Which answers stopped by themselves. (B, T), (B, T) -> (B,) bool."""
    last = ids.gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0)).squeeze(1)
    return torch.isin(last, torch.tensor(lm.eos, device=ids.device))


@torch.no_grad()
def drift(
    tuned: Loaded,
    base: Loaded,
    task: Task,
    examples: Sequence[Example],
    size: int = 0,
    chunk: int = 256,
    budget: int = 16384,
) -> dict:
    """How far `tuned` is from `base` (see the top of the file). Both must share one tokenizer: raises ValueError if
    they do not.
    """
    if tuned.vocab != base.vocab:
        raise ValueError(
            f"--base {base.name} has another tokenizer ({base.vocab} tokens against {tuned.vocab}): "
            "give the model it was trained from"
        )
    prompts = prompts_for(tuned, task, examples, with_reference=False)
    answers = {
        name: generate(lm, prompts, size or task.max_new_tokens, 0.0) for name, lm in (("base", base), ("tuned", tuned))
    }
    out = {"jsd_to_base": token_jsd(tuned, base, prompts, *answers["base"], chunk, budget)}
    out["retention_ppl"] = perplexity(base, prompts, *answers["tuned"], chunk, budget)
    out["reverse_ppl"] = perplexity(tuned, prompts, *answers["base"], chunk, budget)
    return out


def groups(prompts: list[list[int]], mask: Tensor, budget: int) -> list[list[int]]:
    return passes([len(p) + n for p, n in zip(prompts, mask.sum(1).tolist(), strict=True)], budget)


def perplexity(lm: Loaded, prompts: list[list[int]], ids: Tensor, mask: Tensor, chunk: int, budget: int) -> float:
    """Mean over answers of exp(- mean log-prob per token)."""
    each = []
    lm.model.eval()
    for rows in groups(prompts, mask, budget):
        m = mask[rows].bool()
        flat = sampled_logps(
            read(lm.model, [prompts[i] for i in rows], ids[rows], m),
            ids[rows][m],
            head_of(lm.model, lm.vocab),
            1.0,
            chunk,
        )
        each += [math.exp(-part.mean().item()) for part in flat.split(m.sum(1).tolist())]
    return sum(each) / len(each)


def token_jsd(
    a: Loaded, b: Loaded, prompts: list[list[int]], ids: Tensor, mask: Tensor, chunk: int, budget: int
) -> float:
    """Mean JSD per token of the given answers, chunk by chunk, in nats."""
    total, count = 0.0, 0
    a.model.eval(), b.model.eval()
    for rows in groups(prompts, mask, budget):
        states = [read(lm.model, [prompts[i] for i in rows], ids[rows], mask[rows]) for lm in (a, b)]
        heads = [head_of(lm.model, lm.vocab).ready(x) for lm, x in zip((a, b), states, strict=True)]
        for s in chunks(len(states[0]), chunk):
            logps = [h.logps(h.logits(x[s]), 1.0) for h, x in zip(heads, states, strict=True)]
            total += losses.jsd(*logps, alpha=0.5).sum().item()
        count += len(states[0])
    return total / count


def table(columns: dict[str, dict]) -> str:
    """Markdown: a row per family, a column per measurement, each with its 95 % interval."""
    families = list(next(iter(columns.values()))["by_task"])
    lines = ["| family | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for f in families:
        cells = [
            f"{c['by_task'][f]:5.1f} [{c['interval'][f][0]:.0f}, {c['interval'][f][1]:.0f}]" for c in columns.values()
        ]
        lines.append(f"| {f} | " + " | ".join(cells) + " |")
    lines.append("| **mean** | " + " | ".join(f"**{c['accuracy']:.1f}**" for c in columns.values()) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Held-out accuracy of any checkpoint, alone and with the reference; with --base also how far it has drifted from
    it.
    """
    parser = argparse.ArgumentParser(
        prog="eval.py", description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="short name, hub id, or folder (a run's --out)")
    parser.add_argument("--base", default="", help="measure drift against this model ('' = do not)")
    parser.add_argument("--size", type=int, default=100, help="held-out questions per family")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--out", default="", help="folder for eval.json and eval.md ('' = only print)")
    args = parser.parse_args(argv)
    try:
        report = evaluate(args.model, args.base, args.size, torch.device(args.device))
    except ValueError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "eval.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "eval.md").write_text(report["table"] + "\n")
    print(report["table"])
    return 0


def evaluate(model: str, base: str, size: int, device: torch.device) -> dict:
    """Everything `python eval.py` prints, as one dict with a ready "table"."""
    task, lm = world.load(test_size=size), load(model, device)
    report = {
        "model": lm.name,
        "alone": measure(lm, task, task.test),
        "with_reference": measure(lm, task, task.test, True),
    }
    report["ood"] = measure(lm, task, task.ood)
    columns = {"alone": report["alone"], "with reference": report["with_reference"]}
    text = table(columns) + "\n\nout of distribution\n" + table({"alone": report["ood"]})
    if base:
        other = load(base, device)
        report["base"], report["drift"] = other.name, drift(lm, other, task, task.test)
        text += "\n\n" + " | ".join(f"{k} {v:.4f}" for k, v in report["drift"].items())
    return report | {"table": text}


if __name__ == "__main__":
    sys.exit(main())
