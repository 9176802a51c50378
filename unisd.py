"""unisd.py - the method: several readings of one answer -> one scalar and its parts.

What: a student wrote an answer. It is read again by the student (question alone), by the teacher (question +
reference), by the teacher under K other contexts (agreement) and by the teacher who was given a wrong reference
(contrast). UniSD (arXiv 2605.06597), eq. 1 and 9:

    L = w_div sum_t c_t min(D_t, kappa)  +  sum_t a_t (w_contrast C_t + w_match F_t + w_nll N_t)
    c_t = m_t w_t / sum m w     a_t = m_t / sum m     (sums over the whole optimizer step; w from agreement.py, and the
                                                      other normalizer, too)

D divergence, C contrast, F features (losses.py), N = -log p_student(y_t) for the cross-entropy baselines, m the
completion mask. The coefficients are known before the first backward, so the gradient cannot depend on how a step is
split into micro-batches.

`ranks` is one run on several processes (parallel.py); in a single process its methods give back what they are given.

Not like the official code: the sampling temperature does not rescale the loss, each mechanism composes with every
other, and what is off is not computed. How tokens become log-probabilities without a tensor of B*T*V is in reading.py.

Depends on torch, losses.py, agreement.py, reading.py, parallel.py.   Try it:  python -m pytest tests/test_unisd.py -q
Shapes: B sequences, T completion tokens, V vocabulary, H hidden size, K contexts; N = unmasked tokens, all sequences
end to end.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import agreement
import losses
from engine.parallel import ALONE, Alone, whole_layers
from engine.reading import Head, Reading, each_token, head_of, sampled_logps, score, through_head


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
    agreement_budget: float = opt(
        1.0, "score the contexts for this share of the sequences only, the least certain; the others keep weight 1"
    )
    uncertainty: str = opt(
        "entropy",
        "what makes a sequence uncertain: the teacher's entropy; its divergence from the student (one more student pass); "
        "random, the control",
        ("entropy", "divergence", "random"),
    )
    log_entropy: bool = opt(True, "log the student's entropy; nothing is minimised by it")
    chunk: int = opt(
        0, "tokens per application of the vocabulary head; bounds memory, never changes the result (0 = by vocabulary)"
    )
    max_tokens_per_pass: int = opt(
        16384, "token budget (rows x longest row) of one scoring pass; bounds memory, never changes the result"
    )

    @property
    def uses_agreement(self) -> bool:
        return self.agreement != "none" and bool(self.gamma and self.w_div and self.agreement_budget)

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


@dataclass
class Targets:
    """All that the teachers say about a step's answers, without gradient; computed once, before the student is touched."""

    batch: Batch
    weights: Tensor  # (B, T) reliability w in (0, 1]
    hidden: Tensor | None = None  # (B, T, H) states of the teacher who saw the reference
    head: Head | None = None  # that teacher's own head: an EMA teacher's differs from the student's
    negative: Tensor | None = None  # (B, T) log-prob of y_t under the teacher who saw a wrong reference
    c: Tensor | None = None  # (B, T) coefficient of the divergence
    a: Tensor | None = None  # (B, T) coefficient of everything else
    ceiling: float | Tensor | None = None  # where the divergence is clipped
    now: Tensor | None = None  # (B, T) the divergence before the update, once something asked for it

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
    model: nn.Module,
    teacher: Callable[[], AbstractContextManager],
    batch: Batch,
    vocab: int,
    m: Mechanisms,
    ranks: Alone = ALONE,
    tally: dict | None = None,
) -> Targets:
    """Let the teacher read the student's answers. `with teacher():` turns `model` into the teacher (frozen, EMA, or
    itself).

    Runs *before* the student's own pass: applying the teacher swaps the student's weights in place. `ranks` are the
    processes that share the step: what is a property of the whole step (quantile, denominator) is taken over all of them.
    Raises ValueError if every token is masked, or for K = 1 with variance.
    """
    wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    everyone = list(range(len(batch.mask)))
    t = Targets(batch, weights=torch.ones(batch.mask.shape, dtype=wide, device=batch.mask.device))
    t.ceiling = m.clip if m.clip and m.w_div else None
    logp = lambda tau: lambda h, ids: sampled_logps(h, ids, t.head, tau, m.chunk)
    if m.uses_teacher:
        # One stream of passes where all of it is wanted; otherwise the contexts wait for what the first pass says.
        at_once = m.uses_agreement and m.agreement_budget >= 1
        readings = [Reading(batch.teacher, lambda h, ids: h, everyone)]
        if m.w_contrast:
            readings.append(Reading(batch.negative, logp(m.distill_temperature), everyone))
        contexts = lambda rows: [Reading(c, logp(m.agreement_temperature), rows) for c in batch.contexts]
        with teacher():
            # Detached, the head keeps pointing at the teacher's weights after the student's are back in the model.
            t.head = head_of(model, vocab).detach()
            scores = score(
                model,
                readings + (contexts(everyone) if at_once else []),
                batch.ids,
                batch.mask,
                m.max_tokens_per_pass,
                tally,
            )
        t.hidden = scores[0]
        t.negative = scores[1] if m.w_contrast else None
        if at_once:
            t.weights = reliability(torch.stack(scores[len(readings) :]), batch.mask, m, ranks)
        elif m.uses_agreement:
            some = least_certain(model, t, vocab, m, ranks, tally)
            with teacher():
                scores = score(model, contexts(some), batch.ids, batch.mask, m.max_tokens_per_pass, tally)
            scored = torch.zeros_like(batch.mask)
            scored[some] = batch.mask[some]
            t.weights = reliability(torch.stack(scores), scored, m, ranks)
    mask, ones = ranks.gather(batch.mask), ranks.gather(torch.ones_like(t.weights))
    t.c = ranks.mine(agreement.coefficients(mask, ranks.gather(t.weights), m.normalizer), batch.mask)
    t.a = ranks.mine(agreement.coefficients(mask, ones, m.normalizer), batch.mask)
    return t


def least_certain(
    model: nn.Module, t: Targets, vocab: int, m: Mechanisms, ranks: Alone = ALONE, tally: dict | None = None
) -> list[int]:
    """The sequences whose contexts are worth their passes: the most uncertain share `agreement_budget` of the whole step,
    rounded up. -> row numbers, ascending.

    Uncertainty of a sequence: the mean over its tokens of the teacher's entropy, or of the divergence from the student.
    """
    mask = t.batch.mask
    if m.uncertainty == "random":
        # The seed is the step's own answers: the same at every resume, and however many processes share the step.
        seed = torch.Generator().manual_seed(int(ranks.total((t.batch.ids * mask).sum())))
        n = len(mask) * ranks.size
        each = torch.rand(n, generator=seed)[ranks.share(n)].to(mask.device)
    else:
        flat = (
            each_token(t.hidden[mask.bool()], t.head, m.distill_temperature, m.chunk, lambda p, s: losses.entropy(p))
            if m.uncertainty == "entropy"
            else divergence_now(model, t, vocab, m, tally)[mask.bool()]
        )
        each = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask.bool(), flat.float())
        each = each.sum(1) / mask.sum(1).clamp(min=1)
    everyone = ranks.gather(each)
    chosen = torch.zeros_like(everyone)
    chosen[everyone.topk(math.ceil(m.agreement_budget * len(everyone))).indices] = 1
    return ranks.mine(chosen, each).nonzero().squeeze(1).tolist()


def reliability(readings: Tensor, mask: Tensor, m: Mechanisms, ranks: Alone = ALONE) -> Tensor:
    """Eq. 2: K readings of the sampled tokens' log-probs -> weights; masked tokens' count nowhere. (K, B, T), (B, T) -> (B, T)."""
    delta = agreement.disagreement(readings, mask, m.agreement, m.stat)
    if m.agreement == "token":
        return ranks.mine(agreement.token_weights(ranks.gather(delta), ranks.gather(mask), m.gamma), mask)
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

    beside = (t["teacher"], teacher_head.ready(student)) if m.w_div or m.w_contrast else None

    def terms(logits: Tensor, others: Tensor | None, s: slice) -> tuple[Tensor, dict]:
        logps = head.logps(logits, m.distill_temperature)  # (n, V)
        chosen = losses.token_logps(logps, t["ids"][s])  # (n,)
        total, out = logps.new_zeros(()), {}
        if beside:
            with torch.no_grad():
                teacher = beside[1].logps(others, m.distill_temperature)
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
        if m.log_entropy:
            out["entropy"] = losses.entropy(logps.detach())
        return total, {k: v.detach() for k, v in out.items()}

    loss, values = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32)), {}
    if beside or m.w_nll:
        loss, values = through_head(student, head, terms, m.chunk, beside)
    if m.w_match:
        values["match"] = losses.feature_mse(student, t["teacher"])
        loss = loss + m.w_match * (t["a"] * values["match"]).sum()
    return loss, {k: v.detach() for k, v in values.items()}


@torch.no_grad()
def divergence_now(model: nn.Module, t: Targets, vocab: int, m: Mechanisms, tally: dict | None = None) -> Tensor:
    """Every token's divergence before the update, for a ceiling at its quantile and for `uncertainty`: one more pass of
    the student. -> (B, T).
    """
    if t.now is not None:
        return t.now
    mask, everyone = t.batch.mask.bool(), list(range(len(t.batch.mask)))
    student = [Reading(t.batch.student, lambda h, ids: h, everyone)]
    with whole_layers(model):
        (states,) = score(model, student, t.batch.ids, t.batch.mask, m.max_tokens_per_pass, tally)
    hidden, ids, speaker, tau = t.hidden[mask], t.batch.ids[mask], t.head.ready(states), m.distill_temperature
    teacher = lambda s: speaker.logps(speaker.logits(hidden[s]), tau)
    against = lambda logps, s: divergence(logps, teacher(s), ids[s], m)
    flat = each_token(states[mask], head_of(model, vocab), tau, m.chunk, against)
    t.now = torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)
    return t.now
