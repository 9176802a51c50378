"""reference.py - the torch code behind the vectors, under the names and signatures that the vectors use.

What: losses.py, agreement.py, half_life and completion_mask are taken as they are. Four more are thin wrappers around what
the project runs: the EMA as a function of arrays, the states that predict each token, the head, and the whole objective of
one optimizer step on *recorded* states, through the calls that train.py makes.
Depends on torch and the repository.   Try it:  python tests/golden/check.py reference
Shapes: B sequences, T completion tokens, V vocabulary, H hidden size, K contexts, N unmasked tokens, L row length.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from agreement import coefficients, disagreement, sequence_weights, token_weights, weighted_mean
from ema import EMA, half_life
from engine.config import Config, contradictions
from engine.head import Head, chunked_objective, head_of
from engine.reading import PackedReader
from engine.rollout import completion_mask
from losses import (
    clip_tokens,
    contrastive,
    entropy,
    feature_mse,
    forward_kl,
    jsd,
    kl,
    quantile_ceiling,
    reverse_kl,
    sampled_reverse_kl,
    token_logps,
    top_k_with_tail,
)
from train import weigh_step
from unisd import Batch, read, score_teachers, tokens_of


class Recorded(nn.Module):
    """A "language model" whose states are given: a row that starts with token r gets row r of the table (R, L, H)."""

    def __init__(self, table: Tensor, weight: Tensor | None = None):
        super().__init__()
        self.table, self.head = table, SimpleNamespace(weight=weight, bias=None)
        self.of_this_type = nn.Parameter(torch.zeros((), dtype=table.dtype))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(final_logit_softcapping=None))

    def get_output_embeddings(self):
        return self.head

    def get_decoder(self):
        states = lambda input_ids, use_cache: self.table[input_ids[:, 0], : input_ids.shape[1]]
        return lambda **given: SimpleNamespace(last_hidden_state=states(**given))

    @contextmanager
    def speaking_with(self, weight: Tensor):
        mine, self.head = self.head, SimpleNamespace(weight=weight, bias=None)
        yield
        self.head = mine


def predicting_states(states: Tensor, prompt_lengths: Tensor, mask: Tensor) -> Tensor:
    """unisd.read of recorded states. (B, L, H), (B,), (B, T) -> (N, H)."""
    prompts = [[b] * n for b, n in enumerate(prompt_lengths.tolist())]
    return read(Recorded(states), prompts, torch.zeros_like(mask), mask)


def head_logps(
    states: Tensor, weight: Tensor, bias: Tensor | None, *, vocab: int, softcap: float | None, temperature: float
) -> Tensor:
    """engine.head.Head, cut to the vocabulary as Head.ready cuts it, but with the gradient of its weights. -> (N, V)."""
    head = Head(weight[:vocab], vocab, None if bias is None else bias[:vocab], softcap)
    return head.logps(head.logits(states), temperature)


def ema_update(shadow: Tensor, student: Tensor, *, decay: float) -> Tensor:
    """One ema.EMA.update of a model with a single parameter. (...), (...) -> (...)."""
    model = nn.Module()
    model.w = nn.Parameter(shadow.clone())
    average = EMA(model, decay)
    model.w.data = student.clone()
    average.update(model)
    return average.shadow["w"]


def objective(
    student: Tensor,
    teacher: Tensor | None,
    negative: Tensor | None,
    contexts: Tensor | None,
    ids: Tensor,
    mask: Tensor,
    head: Tensor | None,
    teacher_head: Tensor | None,
    *,
    vocab: int,
    rows: list[int] | None,
    **settings,
) -> dict[str, Tensor]:
    """One optimizer step's loss from recorded states (B, T, H), contexts (K, B, T, H); a head of None is the identity.

    -> {"loss": (), and, to look at, "weights", "coefficients", "ceiling", "div", "contrast", "match", "nll" (B, T)}.
    """
    m, B = Config(**settings), len(ids)
    for why in contradictions(m):  # what the command line refuses: two ceilings, `sampled` of anything but a reverse KL ...
        raise ValueError(why)
    identity = torch.eye(vocab, dtype=student.dtype)
    weight, other = (identity if w is None else w for w in (head, teacher_head))
    # One-token prompts [row of the table]: then the state at position t, from 0 on, predicts completion token t.
    table, prompts = [student], {"student": [[b] for b in range(B)]}
    for name, states in {"teacher": teacher, "negative": negative}.items():
        prompts[name] = [[len(table) * B + b] for b in range(B)]
        table += [] if states is None else [states]
    readings = [] if contexts is None else list(contexts)
    wide = [[[(len(table) + k) * B + b] for b in range(B)] for k in range(len(readings))]
    model = Recorded(nn.functional.pad(torch.cat(table + readings), (0, 0, 0, 1)), weight)
    batch = Batch(**prompts, contexts=wide, ids=ids, mask=mask)
    teacher_speaks = lambda: model.speaking_with(other)
    with teacher_speaks():
        speaker = head_of(model, vocab)
        reader = PackedReader(model, speaker, batch, m.max_tokens_per_pass)
        scores = score_teachers(reader, batch, m, with_contexts=m.agreement_budget >= 1)
    weights, ceiling = weigh_step(reader, scores, teacher_speaks, m)
    tokens = tokens_of(batch, scores, weights, ceiling)
    chosen, ends = slice(*rows) if rows else slice(0, B), [0, *mask.sum(1).cumsum(0).tolist()]
    piece = slice(ends[chosen.start], ends[chosen.stop])
    own = read(model, batch.student[chosen], ids[chosen], mask[chosen])
    states = None if scores.states is None else scores.states[piece]
    loss, values = chunked_objective(own, head_of(model, vocab), states, speaker, tokens[piece], m)
    place = lambda x: torch.zeros(mask.shape, dtype=x.dtype).masked_scatter(mask.bool(), x)
    out = {"loss": loss, "weights": weights.reliability, "coefficients": weights.share}
    if ceiling is not None:
        out["ceiling"] = torch.as_tensor(ceiling, dtype=loss.dtype)
    return out if rows else out | {k: place(v) for k, v in values.items() if k != "entropy"}


FUNCTIONS = {
    f.__name__: f
    for f in (
        *(token_logps, kl, forward_kl, reverse_kl, jsd, top_k_with_tail, sampled_reverse_kl, clip_tokens),
        *(quantile_ceiling, contrastive, feature_mse, entropy),
        *(disagreement, token_weights, sequence_weights, coefficients, weighted_mean),
        *(ema_update, half_life, completion_mask, predicting_states, head_logps, objective),
    )
}
