"""unisd.py - the method: several readings of one answer -> one scalar and its parts.

What: a student wrote an answer. It is read again by the student (question alone), by the teacher (question +
reference), by the teacher under K other contexts (agreement) and by the teacher who was given a wrong reference
(contrast). UniSD (arXiv 2605.06597), eq. 1 and 9:

    L = sum_t c_t min(D_t, kappa)  +  sum_t a_t (w_contrast C_t + w_match F_t + w_nll N_t)
    c_t = m_t w_t / sum m w     a_t = m_t / sum m     (sums over the whole optimizer step; w from agreement.py)

D divergence, C contrast, F features (losses.py), N = -log p_student(y_t) for the cross-entropy baselines, m the
completion mask. The coefficients are known before the first backward, so the gradient cannot depend on how a step is
split into micro-batches.

Not like the official code: the sampling temperature does not rescale the loss, each mechanism composes with every
other, and what is off is not computed. How tokens become log-probabilities without a tensor of B*T*V is in reading.py.

Depends on torch, losses.py, agreement.py, reading.py.   Try it:  python -m pytest tests/test_unisd.py -q
Shapes: B sequences, T completion tokens, V vocabulary, H hidden size, K contexts; N = unmasked tokens, all sequences
end to end.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import agreement
import losses
from reading import Head, chunks, head_of, passes, read, sampled_logps, through_head


def opt(default, help: str, choices: tuple = ()):
    """A setting: its default, what --help says, and what it may be. Every setting of the project is declared through
    this.
    """
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Mechanisms:
    """What the loss is made of. 0 or "none" is off, and what is off costs nothing."""

    w_div: float = opt(1.0, "weight of the divergence to the teacher, eq. 1 (0 = off)")
    divergence: str = opt(
        "forward",
        "forward = KL(teacher||student), reverse = KL(student||teacher), jsd = eq. 7",
        ("forward", "reverse", "jsd"),
    )
    alpha: float = opt(0.5, "jsd only: weight of the teacher in the mixture, strictly between 0 and 1")
    estimator: str = opt(
        "full",
        "full = whole vocabulary; top-k = the teacher's k tokens + one tail bucket; sampled = the sampled token only",
        ("full", "top-k", "sampled"),
    )
    top_k: int = opt(100, "estimator top-k only: tokens kept")
    clip: float = opt(0.0, "static ceiling on each token's divergence, in nats, eq. 9 (0 = off)")
    clip_quantile: float = opt(
        0.0, "ceiling at this quantile of the step's own divergences; costs one more student pass (0 = off)"
    )
    agreement: str = opt("none", "weigh by how far K contexts agree, eq. 2", ("none", "token", "sequence"))
    gamma: float = opt(0.01, "strength of the agreement weights (0 = off)")
    stat: str = opt("var", "disagreement of the K readings: variance or max - min", ("var", "range"))
    normalizer: str = opt(
        "batch", "batch: sequence weights act; sequence: the official form, where they cancel", ("batch", "sequence")
    )
    w_contrast: float = opt(0.0, "weight of the token contrast with a wrong reference, eq. 5 (0 = off)")
    margin: float = opt(0.5, "contrast: by how many nats the wrong teacher should be further away")
    w_match: float = opt(0.0, "weight of final-layer feature matching, eq. 6 (0 = off)")
    w_nll: float = opt(0.0, "weight of plain cross-entropy on the completion tokens, for the baselines (0 = off)")
    distill_temperature: float = opt(
        1.0, "divides both models' logits inside the divergence, the contrast and the cross-entropy"
    )
    agreement_temperature: float = opt(1.0, "divides the teacher's logits when the K contexts are compared")
    chunk: int = opt(64, "tokens per application of the vocabulary head; bounds memory, never changes the result")
    max_tokens_per_pass: int = opt(
        16384, "token budget (rows x longest row) of one teacher pass; bounds memory, never changes the result"
    )

    @property
    def uses_agreement(self) -> bool:
        return self.agreement != "none" and self.gamma != 0 and self.w_div != 0

    @property
    def uses_teacher(self) -> bool:
        return bool(self.w_div or self.w_contrast or self.w_match)


@dataclass
class Batch:
    """One optimizer step's answers, and the prompts under which they are read. Prompts are lists of token ids, of any
    lengths.
    """

    student: list[list[int]]  # B prompts: the question alone
    teacher: list[list[int]]  # B prompts: question + reference
    negative: list[list[int]]  # B prompts: question + wrong reference   (may be empty when contrast is off)
    contexts: list[list[list[int]]]  # K lists of B prompts                    (may be empty when agreement is off)
    ids: Tensor  # (B, T) the completions
    mask: Tensor  # (B, T) 1 up to and including the first end-of-text token


@torch.no_grad()
def score(
    model: nn.Module, prompts: list[list[int]], batch: Batch, budget: int, finish: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Read the batch's answers under other prompts, in as few passes as the budget allows. -> (B, T) or (B, T, H), 0
    where masked.

    finish(states (n, H), ids (n,)) says what is kept of each token: its state, or its log-probability.
    """
    out, counts = None, batch.mask.sum(1).tolist()
    for rows in passes([len(p) + n for p, n in zip(prompts, counts, strict=True)], budget):
        ids, mask = batch.ids[rows], batch.mask[rows]
        kept = finish(read(model, [prompts[i] for i in rows], ids, mask), ids[mask.bool()])
        if out is None:
            out = kept.new_zeros(*batch.mask.shape, *kept.shape[1:])
        for i, values in zip(rows, kept.split([counts[i] for i in rows]), strict=True):
            out[i, : counts[i]] = values
    return out


@dataclass
class Targets:
    """All that the teachers say about a step's answers, without gradient; computed once, before the student is touched."""

    batch: Batch
    hidden: Tensor | None  # (B, T, H) states of the teacher who saw the reference
    head: Head | None  # that teacher's own head: an EMA teacher's differs from the student's
    negative: Tensor | None  # (B, T) log-prob of y_t under the teacher who saw a wrong reference
    weights: Tensor  # (B, T) reliability w in (0, 1]
    c: Tensor  # (B, T) coefficient of the divergence
    a: Tensor  # (B, T) coefficient of everything else
    ceiling: float | Tensor | None = None  # where the divergence is clipped

    def rows(self, b: slice) -> dict[str, Tensor | None]:
        """The sequences `b`, as flat unmasked tokens: what unisd_loss takes."""
        m = self.batch.mask[b].bool()
        pick = lambda x: None if x is None else x[b][m]
        return dict(
            ids=pick(self.batch.ids),
            teacher=pick(self.hidden),
            negative=pick(self.negative),
            c=pick(self.c),
            a=pick(self.a),
        )


@torch.no_grad()
def score_teachers(
    model: nn.Module, teacher: Callable[[], AbstractContextManager], batch: Batch, vocab: int, m: Mechanisms
) -> Targets:
    """Let the teacher read the student's answers. `with teacher():` turns `model` into the teacher (frozen, EMA, or
    itself).

    Runs *before* the student's own pass: applying the teacher swaps the student's weights in place.
    Raises ValueError if every token is masked, or for K = 1 with variance.
    """
    hidden = negative = head = None
    wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    weights = torch.ones(batch.mask.shape, dtype=wide, device=batch.mask.device)
    if m.uses_teacher:
        with teacher():
            # Detached, the head keeps pointing at the teacher's weights after the student's are back in the model.
            head = head_of(model, vocab).detach()
            logp = lambda tau: lambda h, ids: sampled_logps(h, ids, head, tau, m.chunk)
            hidden = score(model, batch.teacher, batch, m.max_tokens_per_pass, lambda h, ids: h)
            if m.w_contrast:
                negative = score(model, batch.negative, batch, m.max_tokens_per_pass, logp(m.distill_temperature))
            if m.uses_agreement:
                readings = [
                    score(model, c, batch, m.max_tokens_per_pass, logp(m.agreement_temperature)) for c in batch.contexts
                ]
                weights = reliability(torch.stack(readings), batch.mask, m)
    c = agreement.coefficients(batch.mask, weights, m.normalizer)
    a = agreement.coefficients(batch.mask, torch.ones_like(weights), m.normalizer)
    return Targets(batch, hidden, head, negative, weights, c, a, m.clip if m.clip and m.w_div else None)


def reliability(readings: Tensor, mask: Tensor, m: Mechanisms) -> Tensor:
    """Eq. 2: K readings of the sampled tokens' log-probs -> weights. (K, B, T), (B, T) -> (B, T)."""
    delta = agreement.disagreement(readings, mask, m.agreement, m.stat)
    if m.agreement == "token":
        return agreement.token_weights(delta, mask, m.gamma)
    return agreement.sequence_weights(delta, m.gamma).unsqueeze(1).expand_as(mask)


def divergence(student: Tensor, teacher: Tensor, ids: Tensor, m: Mechanisms) -> Tensor:
    """The chosen D, over the whole vocabulary or estimated. (n, V), (n, V), (n,) -> (n,)."""
    if m.estimator == "sampled":
        return losses.sampled_reverse_kl(losses.token_logps(student, ids), losses.token_logps(teacher, ids))
    if m.estimator == "top-k":
        student, teacher = losses.top_k_with_tail(student, teacher, m.top_k)
    if m.divergence == "jsd":
        return losses.jsd(student, teacher, m.alpha)
    return {"forward": losses.forward_kl, "reverse": losses.reverse_kl}[m.divergence](student, teacher)


def unisd_loss(
    student: Tensor,
    head: Head,
    t: dict,
    teacher_head: Head | None,
    m: Mechanisms,
    ceiling: float | Tensor | None = None,
) -> tuple[Tensor, dict]:
    """Eq. 1 over N tokens. -> (loss (), per-token values {name: (N,)} without gradient, for the log).

    student (N, H) with gradient; t = Targets.rows(...): ids (N,), teacher (N, H), negative (N,), c (N,), a (N,), what
    is not needed is None. With an identity head this is the same function on logits. Sums over micro-batches of a step
    add up to the step's loss and gradient.
    """

    speaker = teacher_head.ready(student) if m.w_div or m.w_contrast else None

    def terms(logits: Tensor, s: slice) -> tuple[Tensor, dict]:
        logps = head.logps(logits, m.distill_temperature)  # (n, V)
        chosen = losses.token_logps(logps, t["ids"][s])  # (n,)
        total, out = logps.new_zeros(()), {}
        if speaker:
            with torch.no_grad():
                teacher = speaker.logps(speaker.logits(t["teacher"][s]), m.distill_temperature)
        if m.w_div:
            out["div"] = divergence(logps, teacher, t["ids"][s], m)
            total = total + m.w_div * (t["c"][s] * losses.clip_tokens(out["div"], ceiling)).sum()
        if m.w_contrast:
            positive = losses.token_logps(teacher, t["ids"][s])
            out["contrast"] = losses.contrastive(chosen, positive, t["negative"][s], m.margin)
            total = total + m.w_contrast * (t["a"][s] * out["contrast"]).sum()
        if m.w_nll:
            total = total - m.w_nll * (t["a"][s] * chosen).sum()
        out["nll"] = -chosen
        out["entropy"] = losses.entropy(logps.detach())
        return total, {k: v.detach() for k, v in out.items()}

    loss, values = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32)), {}
    if speaker or m.w_nll:
        loss, values = through_head(student, head, terms, m.chunk)
    if m.w_match:
        values["match"] = losses.feature_mse(student, t["teacher"])
        loss = loss + m.w_match * (t["a"] * values["match"]).sum()
    return loss, {k: v.detach() for k, v in values.items()}


@torch.no_grad()
def divergence_now(model: nn.Module, t: Targets, vocab: int, m: Mechanisms, micro_batch: int) -> Tensor:
    """Every token's divergence before the update, for a ceiling at its quantile: the one mechanism that needs the whole
    step first. -> (B, T).
    """
    out = torch.zeros(t.batch.mask.shape, device=t.batch.mask.device)
    for rows in chunks(len(out), micro_batch):
        states = read(model, t.batch.student[rows], t.batch.ids[rows], t.batch.mask[rows])
        _, each = unisd_loss(states, head_of(model, vocab), t.rows(rows), t.head, m)
        out[rows][t.batch.mask[rows].bool()] = each["div"].to(out.dtype)
    return out
