"""adaptive.py - contexts for the least certain answers only.

Agreement is what UniSD* costs: K more readings of every answer, with longer prompts. The paper's authors propose, as a next
step that they did not take, to spend them on uncertain samples only. `--agreement-budget .25` does: the quarter of the step's
sequences with the highest uncertainty is read under the contexts; the others keep weight 1.

    uncertainty of a sequence = mean over its tokens of the teacher's entropy, or of the divergence from the student

Depends on unisd.py, losses.py, head.py, reading.py, parallel.py.   Try it:  python -m pytest tests/test_adaptive.py -q
Shapes: b this process' sequences, B the whole step's, T completion tokens.
"""

import math

import torch
from torch import Tensor

import losses
from engine.config import Config
from engine.head import each_token, head_of
from engine.parallel import ALONE, Alone, whole_layers
from engine.reading import PackedReader
from unisd import Batch, Reading, Scores, divergence


@torch.no_grad()
def divergence_before(reader: PackedReader, scores: Scores, cfg: Config) -> Tensor:
    """Every token's divergence before the update: one more pass of the student. For a ceiling at its quantile, and for
    --uncertainty divergence. -> (b, T), 0 where masked
    """
    model, batch, teacher_head, tau = reader.model, reader.batch, reader.head, cfg.distill_temperature
    student_head = head_of(model, teacher_head.vocab)  # the model is the student again
    student = PackedReader(model, student_head, batch, reader.budget, reader.chunk, reader.tally)
    with whole_layers(model):
        states = student([Reading("student", batch.student)])["student"]
    ids, teacher_head = batch.ids[batch.mask.bool()], teacher_head.ready(states)

    def measure(logps: Tensor, which: slice) -> Tensor:
        teacher = teacher_head.logps(teacher_head.logits(scores.states[which]), tau)
        return divergence(logps, teacher, ids[which], cfg)

    return scattered(each_token(states, student_head, tau, reader.chunk, measure), batch)


def scattered(values: Tensor, batch: Batch) -> Tensor:
    """One number for each unmasked token -> (b, T), 0 where masked."""
    mask = batch.mask.bool()
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


@torch.no_grad()
def uncertainty(reader: PackedReader, scores: Scores, cfg: Config, before: Tensor | None, ranks: Alone = ALONE) -> Tensor:
    """How uncertain each of this process' sequences is, by --uncertainty. `before`: divergence_before, if asked. -> (b,)"""
    batch = reader.batch
    if cfg.uncertainty == "random":
        # The control. Its seed is the step's own answers: the same at every resume, whatever the number of processes.
        seed = torch.Generator().manual_seed(int(ranks.total((batch.ids * batch.mask).sum())))
        n = len(batch.mask) * ranks.size
        return torch.rand(n, generator=seed)[ranks.share(n)].to(batch.mask.device)
    if cfg.uncertainty == "entropy":
        entropies = lambda logps, _: losses.entropy(logps)
        before = scattered(each_token(scores.states, reader.head, cfg.distill_temperature, reader.chunk, entropies), batch)
    return before.sum(1) / batch.mask.sum(1).clamp(min=1)


def least_certain(each: Tensor, budget: float, ranks: Alone = ALONE) -> list[int]:
    """The most uncertain share of the *whole step's* sequences, rounded up. -> this process' row numbers, ascending.

    each (b,). Three sequences and a budget of .4 are 1.2, so two.
    """
    everyone = ranks.gather(each)
    chosen = torch.zeros_like(everyone)
    chosen[everyone.topk(math.ceil(budget * len(everyone))).indices] = 1
    return ranks.mine(chosen, each).nonzero().squeeze(1).tolist()
