"""losses.py - every scalar we minimise, as a formula.

One model plays both parts: as student it sees the question, as teacher a reference solution, too. At each token of an
answer both say how likely every token of the vocabulary is. Cross-entropy teaches one label; to learn all the teacher
says, we need to measure how far apart two distributions are: one value per token, in nats (natural logarithms).

    forward KL   D = KL(teacher || student)                            "cover whatever the teacher might say"
    reverse KL   D = KL(student || teacher)                            "say only what the teacher might say"
    JSD          D = a KL(teacher || M) + (1-a) KL(student || M),  M = (1-a) student + a teacher          eq. 7-8
    clip         D~ = min(D, kappa)                                                                         eq. 9
    contrast     max(0, margin + |l_student - l_positive| - |l_student - l_negative|)                       eq. 4-5
    features     mean over H of (f_student - f_teacher)^2                                                    eq. 6

The equations are those of UniSD (arXiv 2605.06597). Inputs are log-probabilities, never logits: the fp32 upcast and the
temperature belong to the vocabulary head.   Depends on torch only.   Try it:  python losses.py
Shapes: B sequences, T completion tokens, V vocabulary, H hidden size; "..." is any leading shape, (B, T) or (tokens,).
"""

import math

import torch
from torch import Tensor

LN2 = math.log(2.0)


def token_logps(logps: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of the token that was actually written. Its negative is the usual cross-entropy.

    (..., V), (...) -> (...)
    """
    return logps.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), from log-probabilities.

    (..., V), (..., V) -> (...)
    Written out, so that the direction can be read: torch's kl_div(q, p) is KL(p || q).
    """
    # A token that p rules out (log p = -inf) adds exactly 0, because x ln x -> 0 as x -> 0. But its log-ratio is -inf,
    # or nan if q rules it out as well, and 0 * -inf is nan. So the ratio is replaced *before* it is multiplied.
    # Why in place is safe: backward uses what an operation saved. x * y saves x and y; p - q saves nothing, because its
    # derivatives are +1 and -1 whatever the values. So nobody misses the difference when it is overwritten, and one
    # tensor of V numbers per token is spared. The product comes later, and saves the corrected ratio.
    log_ratio = (p - q).masked_fill_(p == -torch.inf, 0.0)
    return (p.exp() * log_ratio).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), mode-covering: wherever the teacher puts mass, the student must put some.

    (..., V), (..., V) -> (...)
    Descent pushes logit v by p_teacher(v) - p_student(v), never by more than 1. Token 3 of the example at the end, word B:
    the student gives it .01 and the teacher .80, so the push is +.79.
    Cross-entropy on a label is the special case of a teacher that gives the label probability 1.
    """
    return kl(teacher, student)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher), mode-seeking: the student may settle for one of the things the teacher might say.

    (..., V), (..., V) -> (...)
    Descent pushes logit v by p_student(v) (KL - log(p_student(v) / p_teacher(v))). The first factor is the catch: for the
    same word B, at KL = 2.13, it is .01 (2.13 + 4.38) = +.07. What the student never says, it hardly learns.
    It suits tokens that the student sampled: the KL, too, is an expectation under the student's own distribution.
    """
    return kl(student, teacher)


def jsd(student: Tensor, teacher: Tensor, alpha: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence, eq. 7-8: how far both are from their mixture; never above ln 2 = .693.

    (..., V), (..., V) -> (...)
    M = (1-alpha) student + alpha teacher.  D = alpha KL(teacher || M) + (1-alpha) KL(student || M).
    Raises ValueError unless 0 < alpha < 1: at 0 and at 1 it is identically zero (use forward_kl or reverse_kl).
    """
    if not 0.0 < alpha < 1.0:
        fix = "for a KL use divergence forward or reverse"
        raise ValueError(f"alpha must lie strictly between 0 and 1 for the JSD, got {alpha}; {fix}")
    # A token both rule out is -inf twice, where logaddexp has no gradient (nan). -1e30 is as impossible, and finite.
    student, teacher = student.clamp(min=-1e30), teacher.clamp(min=-1e30)
    # log((1-a) p + a q) = logaddexp(log(1-a) + log p, log a + log q): no probability is ever small enough to become 0.
    mixture = torch.logaddexp(student + math.log1p(-alpha), teacher + math.log(alpha))
    return alpha * kl(teacher, mixture) + (1.0 - alpha) * kl(student, mixture)


def top_k_with_tail(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The teacher's k likeliest tokens and one bucket, the tail, for all the others; as log-probabilities.

    (..., V), (..., V) -> (..., k + 1), (..., k + 1)
    With the tail both still sum to 1: a divergence of them is never negative, never above the full one, and equal to it
    at k = V. Without it, k = 1 puts a student at .9 at the "distance" .5 ln(.5 / .9) = -.29 from a teacher at .5.
    """
    top = teacher.topk(min(k, teacher.shape[-1]), dim=-1).indices

    def bucketed(logps: Tensor) -> Tensor:
        # The tail is summed, not taken as log(1 - sum of the k): fp32 has no number between 1 - 6e-8 and 1, so a tail
        # of 1e-9 (log -20.7) would become 0 or 6e-8 (log -inf or -16.6). The k are blanked with -1e30, not with -inf:
        # at k = V the tail is empty, and the logsumexp of nothing but -inf has the gradient nan.
        tail = logps.scatter(-1, top, -1e30).logsumexp(-1, keepdim=True)
        return torch.cat([logps.gather(-1, top), tail], -1)

    return bucketed(student), bucketed(teacher)


def sampled_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Estimate of KL(student || teacher) from one sampled token y: log p_student(y) - log p_teacher(y).

    (...), (...) -> (...)
    One value may be negative; the mean over many y is the KL. Value and gradient are unbiased if y was drawn from
    this very p_student: by the student that is being trained, at the temperature of these log-probabilities.
    """
    # Why not return r = log p - log q as it is (p student, q teacher)? Because y was drawn from p, and p moves, too:
    #     KL      = sum_y p r
    #     grad KL = sum_y (grad p) r  +  sum_y p grad r        product rule
    #             = E_y[r grad log p] +  sum_y grad p          grad p = p grad log p, and grad r = grad log p
    # The last sum is grad(sum_y p) = grad 1 = 0, and it is all that autograd finds in r: on average, nothing.
    # The other term is what teaches. student - student.detach() is 0 in value and grad log p in gradient, so the line
    # below has the value r and the gradient r grad log p. Where the teacher likes y better, r < 0, descent raises p(y).
    ratio = (student - teacher).detach()
    return ratio + ratio * (student - student.detach())


def clip_tokens(per_token: Tensor, ceiling: float | Tensor | None) -> Tensor:
    """min(D, ceiling), eq. 9, so that no single token dominates a step. None = no clipping.

    (...) -> (...)
    It comes after the sum over the vocabulary and before the weights. A static one of ln 2 or more never acts on a JSD.
    """
    if ceiling is None:
        return per_token
    # The trap: above the ceiling the value is a constant, and a constant has no gradient. A token at 3.4 nats under a
    # ceiling of 2 is not learned more gently, it is not learned at all; and it is the one with the most to learn.
    return per_token.clamp(max=ceiling)


def quantile_ceiling(per_token: Tensor, mask: Tensor, q: float) -> Tensor:
    """A ceiling that follows the batch: the q-quantile of its unmasked divergences, at least 1e-6, without gradient.

    (B, T), (B, T) -> ()
    It fixes a share instead of a number of nats: q = .95 clips the 5 % of the tokens furthest from the teacher. (1e-6: a
    ceiling of 0, where nearly all tokens agree, would silence all the others.)
    """
    return per_token.detach()[mask.bool()].quantile(q).clamp(min=1e-6)


def contrastive(student: Tensor, positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    """Eq. 5: be nearer to the teacher that saw the right reference than to the one that saw a wrong one.

    (...), (...), (...) -> (...)
    Inputs are log-probs of the *written* token; d+ = |student - positive|, d- = |student - negative|. The loss is
    max(0, margin + d+ - d-): 0 once the negative is further away than the positive by the margin. Between the two it moves
    the token's log-prob towards the right teacher: up where that one finds it likelier, else down.
    """
    # The trap is a dead zone: the gradient, sign(student - positive) - sign(student - negative), is 2 in size between
    # the teachers and exactly 0 outside. Student -2, positive -.5, negative -1: the loss is .5 + 1.5 - 1 = 1. Move the
    # student to -1.9: both distances shrink by .1, and the loss is still 1.
    positive, negative = positive.detach(), negative.detach()
    return (margin + (student - positive).abs() - (student - negative).abs()).clamp(min=0.0)


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 6: squared distance of final-layer states (after the last norm), mean over H, in fp32 or wider.

    (..., H), (..., H) -> (...)
    """
    # In fp32: bf16 has 8 significant bits, and nothing between .1230 and .1235. A mean: one weight suits any width H.
    wide = torch.promote_types(student.dtype, torch.float32)
    return (student.to(wide) - teacher.detach().to(wide)).square().mean(-1)


def entropy(logps: Tensor) -> Tensor:
    """- sum_v p_v log p_v, in nats: 0 = certain, ln V = no idea.

    (..., V) -> (...)
    """
    return -(logps.exp() * logps.masked_fill(logps == -torch.inf, 0.0)).sum(-1)  # 0 ln 0 = 0, as in kl


if __name__ == "__main__":  # a hand-sized example for a pocket calculator; docs/by-hand.md shows its output
    torch.set_default_dtype(torch.float64)
    student = torch.tensor([[0.70, 0.10, 0.10, 0.10], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]])
    teacher = torch.tensor([[0.70, 0.10, 0.10, 0.10], [0.70, 0.20, 0.05, 0.05], [0.10, 0.80, 0.05, 0.05]])
    logits = student.log().requires_grad_()  # softmax(log p) = p
    logps, target = logits.log_softmax(-1), teacher.log()
    forward, reverse, js = forward_kl(logps, target), reverse_kl(logps, target), jsd(logps, target)
    top_1, sampled = forward_kl(*top_k_with_tail(logps, target, 1)), sampled_reverse_kl(logps[:, 0], target[:, 0])
    values = torch.stack([forward, reverse, js, top_1, sampled], -1)
    cells = lambda numbers, form: "".join(f"{round(number, 6) + 0.0:{form}}" for number in numbers.tolist())

    print("Three tokens, a vocabulary of four. The student wrote A each time; the teacher has seen the reference.\n")
    print(f"{'':29}A     B     C     D     forward  reverse      JSD    top-1  sampled")
    for name, p, q, row in zip(["1 they agree", "2 no idea", "3 sure, wrong"], student, teacher, values, strict=True):
        print(f"{name:18}student{cells(p, '6.2f')}\n{'':18}teacher{cells(q, '6.2f')}   {cells(row, '9.3f')}")
    print("Notice: a KL has no upper bound, the JSD stops at ln 2 = 0.693, a sample of one token may be negative.\n")

    print("Where a step of descent moves the logits of token 3 (minus the gradient):")
    for name, loss, formula in [
        ("forward KL", forward, "teacher - student"),
        ("reverse KL", reverse, "student * (KL - ln(student / teacher))"),
        ("JSD", js, "student / 2 * (KL(student || M) - ln(student / M)),  M their mean"),
        ("forward KL clipped at 2", clip_tokens(forward, 2.0), "the value is 2.000, a constant"),
    ]:
        push = -torch.autograd.grad(loss[2], logits, retain_graph=True)[0][2]
        print(f"{name:25}{cells(push, '+6.2f')}   {formula}")
    print("Notice: towards B, forward KL pushes by 0.79 and reverse KL by 0.07; the clip takes the lesson away.\n")

    written, right, wrong = torch.tensor([[-1.0, -2.0, -1.0], [-0.5, -0.5, -0.5], [-1.2, -1.0, -3.0]])
    loss = contrastive(written.requires_grad_(), right, wrong, 0.5)
    push = -torch.autograd.grad(loss.sum(), written)[0]
    table = torch.stack([written, right, wrong, (written - right).abs(), (written - wrong).abs(), loss, push], -1)
    print("Contrast, margin 0.5: log-probability of one written token under the student and the two teachers")
    print("student  right  wrong     d+     d-   loss   push")
    for name, row in zip(["between the teachers", "dead zone", "the margin is met"], table, strict=True):
        print(f"{cells(row, '7.1f')}   {name}")
    print("Notice: the dead zone has a loss but no push, because a step changes both distances alike.")
