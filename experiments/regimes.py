"""regimes.py - does the failure exist that a mechanism was made for? Measured on the base, before anything is trained.

    python -m experiments.regimes                      each failure, in the plain world and in the regime made for it
    python -m experiments.study --world regimes        the runs: regimes.toml, in which the predictions were written first

A mechanism can help only where what it repairs is broken. So each regime has a number that says how broken: how often the
teacher is right, how much of the divergence comes from wrong references or lies in few tokens, how many tokens the contrast can
push, how far a noisy gradient points from the exact one. docs/when-it-helps.md sets these numbers beside the results.
Depends on the core, engine/, tasks/.   Try it:  python -m pytest tests/test_regimes.py -q
"""

import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine import any_console, metrics
from engine.build import task_of
from engine.config import Config, make
from engine.contexts import encode
from engine.head import head_of
from engine.loading import Loaded, load
from engine.rollout import generate
from losses import contrastive, token_logps
from tasks.data import Task
from unisd import (
    Batch,
    Mechanisms,
    Scores,
    Tokens,
    feature_matching,
    objective,
    read,
    read_plainly,
    score_teachers,
    tokens_of,
    weigh,
)


@dataclass
class FirstStep:
    """What the first step of a run would see: the untouched model's own answers and all readings of them, N tokens in all."""

    cfg: Config
    lm: Loaded
    task: Task
    batch: Batch
    scores: Scores
    tokens: Tokens
    states: Tensor  # (N, H) of the student, with a graph
    student: Tensor  # (N, V) log-probabilities, with a graph
    teacher: Tensor  # (N, V)

    def divergence(self) -> Tensor:
        return objective(self.student, self.teacher, self.tokens, self.cfg)[1]["div"]

    def per_answer(self, each: Tensor) -> Tensor:
        """The sum over each answer's tokens. (N,) -> (B,)"""
        mask = self.batch.mask.bool()
        return torch.zeros(mask.shape).masked_scatter(mask, each.detach()).sum(1)

    def gradient(self, m: Mechanisms) -> Tensor:
        """Of eq. 1 under other mechanisms, with respect to all weights, end to end."""
        loss, _ = objective(self.student, self.teacher, self.tokens, m)
        if m.w_match:
            loss = loss + feature_matching(self.states, self.scores.states, self.tokens, m)[0]
        parts = torch.autograd.grad(loss, [*self.lm.model.parameters()], retain_graph=True)
        return torch.cat([part.flatten() for part in parts])


def first_step(questions: int, recipe: str = "sd", **settings) -> FirstStep:
    """The first `questions` training questions, answered by the base at the temperature of training, and read."""
    cfg = make(recipe, train_size=max(40, 5 * -(-questions // 5)), **settings)
    lm, (task, _) = load("tiny", torch.device("cpu")), task_of(cfg)
    prompts = [encode(lm.tokenizer, task, i, cfg, {})[0] for i in range(questions)]
    sides = {name: [p[name] for p in prompts] for name in ("student", "teacher", "negative")}
    noise = torch.rand(questions, cfg.max_new_tokens, generator=torch.Generator().manual_seed(0))
    ids, mask = generate(lm, sides["student"], cfg.max_new_tokens, cfg.temperature, noise)
    batch = Batch(**sides, contexts=[*map(list, zip(*(p["contexts"] for p in prompts), strict=True))], ids=ids, mask=mask)
    head = head_of(lm.model, lm.vocab)
    scores = score_teachers(read_plainly(lm.model, head.detach(), batch), batch, cfg)
    states = read(lm.model, batch.student, ids, mask)
    tokens = tokens_of(batch, scores, weigh(mask, cfg, scores.contexts))
    return FirstStep(cfg, lm, task, batch, scores, tokens, states, head(states), head.detach()(scores.states))


def ceiling(questions: int, **settings) -> float:
    """Per cent of held-out questions that the base answers with its reference in view."""
    cfg = make("sd", eval_size=max(1, questions // 5), **settings)
    task, _ = task_of(cfg)
    return metrics.measure(load("tiny", torch.device("cpu")), task, task.test, True, cfg.max_new_tokens)["accuracy"]


def from_wrong(questions: int, recipe: str = "agree-token", wrong: float = 0.35, **settings) -> float:
    """Per cent of the weighted divergence that comes from questions whose reference is wrong (35 per cent of them are)."""
    step = first_step(questions, recipe, wrong_references=wrong, **settings)
    examples = step.task.train[:questions]
    wrong = torch.tensor([not v["correct"] for v in step.task.score(examples, [e.target for e in examples])])
    parts = step.per_answer(step.tokens.share * step.divergence())
    return 100 * (parts[wrong].sum() / parts.sum()).item()


def untouched(questions: int, **settings) -> float:
    """Per cent of the answers in which the contrast pushes no token at all: dead zone, or the margin is met."""
    step = first_step(questions, "contrast", **settings)
    written, right = (token_logps(x, step.tokens.ids).detach() for x in (step.student, step.teacher))
    contrastive(written.requires_grad_(), right, step.tokens.negative, step.cfg.margin).sum().backward()
    return 100 * (step.per_answer(written.grad.abs()) == 0).float().mean().item()


def beyond(questions: int, **settings) -> float:
    """Per cent of the divergence that lies in tokens above 10 nats."""
    d = first_step(questions, **settings).divergence()
    return 100 * (d[d > 10].sum() / d.sum()).item()


def aligned(questions: int, estimator: str = "full", w_match: float = 0.0) -> float:
    """Cosine between the gradient of the reverse KL over the whole vocabulary and that of an estimate of it."""
    step = first_step(questions, "sdft")
    m = replace(step.cfg, estimator=estimator, w_match=w_match)
    return torch.cosine_similarity(step.gradient(step.cfg), step.gradient(m), 0).item()


FAILURES = {  # mechanism: what is measured, its unit, {where: value}
    "EMA": ("the teacher, with the reference, is right", "per cent", ceiling, {"clean": {}, "faint": dict(references="faint")}),
    "agreement": (
        "of the divergence, weighted, comes from wrong references",
        "per cent",
        from_wrong,
        {
            "no weights": dict(recipe="sd"),
            "the question's own reference in all contexts": {},
            "a reference of its own in each": dict(fresh_references=True),
            "... and the variance of probabilities": dict(fresh_references=True, stat="prob"),
        },
    ),
    "contrast": (
        "of the answers, in which the contrast pushes no token",
        "per cent",
        untouched,
        {"clean": {}, "distinct": dict(references="distinct")},
    ),
    "clip": ("of the divergence lies in tokens above 10 nats", "per cent", beyond, {"clean": {}, "odd": dict(references="odd")}),
    "matching": (
        "cosine of a step's gradient with that of the exact reverse KL",
        "",
        aligned,
        {
            "sampled": dict(estimator="sampled"),
            "with matching .1": dict(estimator="sampled", w_match=0.1),
            "with matching 1": dict(estimator="sampled", w_match=1.0),
        },
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Measure each regime's failure on the untouched base: a few minutes."""
    any_console()
    parser = argparse.ArgumentParser(prog="regimes.py", description=main.__doc__)
    parser.add_argument("--questions", type=int, default=480, help="how many (default: %(default)s, ten steps)")
    args = parser.parse_args(argv)
    for mechanism, (what, unit, measure, places) in FAILURES.items():
        print(f"{mechanism}: {what}")
        for place, settings in places.items():
            n = 48 if measure is aligned else args.questions
            print(f"    {measure(n, **settings):6.1f} {unit}   {place}", flush=True)


if __name__ == "__main__":
    main()
