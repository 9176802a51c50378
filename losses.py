"""losses.py - every scalar we minimise, as a formula.

What: per-token divergences between a student and a teacher, the clip, and the two auxiliary losses of UniSD (arXiv
2605.06597).
In:   log-probabilities, never logits: the fp32 upcast and the temperature happen once, in reading.py.
Out:  one value per token, in nats.

    forward KL   D = KL(teacher || student)                            "cover whatever the teacher might say"
    reverse KL   D = KL(student || teacher)                            "say only what the teacher might say"
    JSD          D = a KL(teacher || M) + (1-a) KL(student || M),  M = (1-a) student + a teacher          eq. 7-8
    clip         D~ = min(D, kappa)                                                                         eq. 9
    contrast     max(0, margin + |l_student - l_positive| - |l_student - l_negative|)                       eq. 4-5
    features     mean over H of (f_student - f_teacher)^2                                                    eq. 6

Not like the official code: the two KLs are *named*, they are not the end points alpha = 0 and 1 of the JSD. The JSD
goes to 0 at both ends (only JSD/alpha goes to a KL), so a float that means "forward KL" at exactly 0 makes the loss
jump by a factor of 1/alpha. We also never call torch's kl_div, whose arguments are reversed: KL is written out, so the
direction can be read.

Depends on torch only.   Try it:  python -m pytest tests/test_losses.py -q
Shapes: B sequences, T completion tokens, V vocabulary, H hidden size. "..." is any leading shape, for example (B, T) or
(tokens,).
"""

import math

import torch
from torch import Tensor

LN2 = math.log(2.0)


def token_logps(logps: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of the token that was actually written. (..., V), (...) -> (...)."""
    return logps.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), from log-probabilities. (..., V), (..., V) -> (...).

    A token that p rules out (log p = -inf) adds exactly 0, whatever q thinks of it: p log p -> 0. Its ratio, -inf or nan,
    is replaced before anything is multiplied with it: 0 times nan is nan. (The gradient of a difference does not look
    at its values, so it is safe to replace after the subtraction.)
    """
    log_ratio = (p - q).masked_fill_(p == -torch.inf, 0.0)
    return (p.exp() * log_ratio).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student): mode-covering. Gradient on the student's logits: p_student - p_teacher, bounded. (...,
    V)x2 -> (...).
    """
    return kl(teacher, student)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher): mode-seeking; the natural one for tokens the student itself sampled. (..., V)x2 -> (...)."""
    return kl(student, teacher)


def jsd(student: Tensor, teacher: Tensor, alpha: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence, eq. 7-8. (..., V)x2 -> (...), never above ln 2.

    M = (1-alpha) student + alpha teacher, in log space.  D = alpha KL(teacher || M) + (1-alpha) KL(student || M).
    Raises ValueError unless 0 < alpha < 1: at 0 and at 1 it is identically zero (use forward_kl or reverse_kl).
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(
            f"alpha must lie strictly between 0 and 1 for the JSD, got {alpha}; for a KL use divergence forward or reverse"
        )
    # A token both rule out is -inf twice, where logaddexp has no gradient (nan). -1e30 is as impossible, and finite.
    student, teacher = student.clamp(min=-1e30), teacher.clamp(min=-1e30)
    mixture = torch.logaddexp(student + math.log1p(-alpha), teacher + math.log(alpha))
    return alpha * kl(teacher, mixture) + (1.0 - alpha) * kl(student, mixture)


def top_k_with_tail(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The teacher's k likeliest tokens and one bucket for all the others. (..., V)x2 -> (..., k + 1)x2, log-probs.

    What comes out are distributions, so any divergence of them is one: never above the full one, equal to it at k = V.
    Without the tail they would be renormalised conditionals, or not sum to 1, and their "KL" could be negative.
    """
    top = teacher.topk(min(k, teacher.shape[-1]), dim=-1).indices

    def bucketed(logps: Tensor) -> Tensor:
        # The tail is summed, not taken as log(1 - sum of the head): that loses every digit where the head has all the
        # mass. -1e30 instead of -inf: an empty tail (k = V) must have probability 0 and a gradient that is not nan.
        tail = logps.scatter(-1, top, -1e30).logsumexp(-1, keepdim=True)
        return torch.cat([logps.gather(-1, top), tail], -1)

    return bucketed(student), bucketed(teacher)


def sampled_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """One-sample estimate of KL(student || teacher) from log-probs of the sampled token. (...)x2 -> (...).

    Value: log p_s(y) - log p_t(y), which may be negative for one token. Gradient: (log p_s(y) - log p_t(y)) grad log
    p_s(y), the score-function form, because y was drawn from the student: the gradient of the value itself has
    expectation 0 and teaches nothing. Both are unbiased for tokens sampled at temperature 1 from the student that is
    being trained.
    """
    ratio = (student - teacher).detach()
    return ratio + ratio * (student - student.detach())


def clip_tokens(per_token: Tensor, ceiling: float | Tensor | None) -> Tensor:
    """min(D, ceiling), eq. 9: beyond the ceiling the value is constant and the gradient is 0. None = no clipping. (...)
    -> (...).

    It comes after the sum over the vocabulary and before the weights. A static ceiling of ln 2 or more can never act on
    a JSD.
    """
    if ceiling is None:
        return per_token
    return per_token.clamp(max=ceiling)


def quantile_ceiling(per_token: Tensor, mask: Tensor, q: float) -> Tensor:
    """The ceiling as a quantile of the batch's own unmasked divergences, at least 1e-6, without gradient. (B, T)x2 ->
    ().
    """
    return per_token.detach()[mask.bool()].quantile(q).clamp(min=1e-6)


def contrastive(student: Tensor, positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    """Eq. 5: be nearer to the teacher who saw the right reference than to the one who saw a wrong one. (B, T)x3 -> (B,
    T).

    Inputs are log-probs of the *sampled* token. With d+ = |student - positive|, d- = |student - negative|: max(0,
    margin + d+ - d-). Only the student carries a gradient, sign(student - positive) - sign(student - negative): it is
    exactly 0 whenever the student lies on the same side of both teachers. The hinge is 0 once the negative is further
    away than the positive by the margin.
    """
    positive, negative = positive.detach(), negative.detach()
    return (margin + (student - positive).abs() - (student - negative).abs()).clamp(min=0.0)


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 6: squared distance of final-layer states (after the last norm), mean over H. (..., H)x2 -> (...), in fp32 or
    wider.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    return (student.to(wide) - teacher.detach().to(wide)).square().mean(-1)


def entropy(logps: Tensor) -> Tensor:
    """- sum_v p_v log p_v, in nats. (..., V) -> (...). 0 = certain, ln V = no idea."""
    return -(logps.exp() * logps.masked_fill(logps == -torch.inf, 0.0)).sum(-1)
