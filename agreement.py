"""agreement.py - how far may we trust this token?

The teacher that gives D saw question and reference; its opinion of a token may be an accident of that one prompt. So the
*same* written tokens are read under K further prompts: a solved example of another question, then the question with (by
default) the same reference. The teacher's own reading is none of the K, unless it is asked for. Where the K differ, the
token (or the whole sequence) counts less.
UniSD (arXiv 2605.06597), eq. 2:

    l_t^k = log p_teacher(y_t | x, c_k, y_<t)          (K, B, T)  the written token's log-prob under context k
    token     d_t = A({l_t^k}_k)      w_t = max(1 / (1 + gamma min(d_t / q, cap)), floor)
                                      q   = max(quantile_0.95 of d over unmasked tokens, 1e-6)
    sequence  d   = A({L^k}_k)        w   = exp(-gamma d),    L^k = mean of l_t^k over unmasked tokens
    A = variance or range (max - min) of the logarithms, or variance of the probabilities (ours)

Weights carry no gradient, the weighted mean does. A gradient through the weights would offer a shortcut: lower the loss
by making hard tokens count less. So weights are measured first, and then used as constants.

Depends on torch only.   Try it:  python agreement.py
Shapes: K contexts, B sequences, T completion tokens.
"""

import torch
from torch import Tensor


@torch.no_grad()
def disagreement(logps: Tensor, mask: Tensor, level: str, stat: str) -> Tensor:
    """How much K readings of the same tokens differ; 0 on masked tokens.

    (K, B, T), (B, T) -> (B, T) for level "token", (B,) for level "sequence"
    Variance divides by K-1 over tokens (unbiased) and by K over sequences (biased), as in the paper's settings: for
    readings of -1 and -3 that is 2 and 1. "prob" takes probabilities instead of logarithms: 1e-9 against 1e-6 is then no dispute.
    Raises ValueError for K = 1 with stat "var" or "prob" (0/0, or always 0), and for an unknown level or stat.
    """
    if level not in ("token", "sequence") or stat not in ("var", "range", "prob"):
        raise ValueError(f"level must be token or sequence and stat var, range or prob, got level={level!r}, stat={stat!r}")
    if stat != "range" and logps.shape[0] < 2:
        raise ValueError(f"the variance of {logps.shape[0]} context is undefined: give at least 2 contexts, or use stat range")
    mask = mask.bool()
    # Masked positions may hold anything, inf and nan included; where() forgets them, a multiplication by 0 would not.
    logps = torch.where(mask, logps, 0.0)
    if level == "sequence":
        # The trap: the mean over tokens comes first, so opposite disputes cancel. Context 1 reads two tokens as -1 and
        # -3, context 2 reads them as -3 and -1: both means are -2, and the sequence counts as undisputed.
        logps = logps.sum(-1) / mask.sum(-1).clamp(min=1)  # (K, B)  L^k: mean over the tokens that count
    if stat == "range":
        return logps.amax(0) - logps.amin(0)
    if stat == "prob":
        logps = logps.exp()  # the geometric mean of its tokens' probabilities, at the level of a sequence
    return logps.var(0, unbiased=level == "token")


@torch.no_grad()
def token_weights(
    delta: Tensor, mask: Tensor, gamma: float, *, quantile: float = 0.95, cap: float = 10.0, floor: float = 0.01
) -> Tensor:
    """max(1 / (1 + gamma min(delta / q, cap)), floor): in (0, 1], 1 on masked tokens and wherever gamma = 0.

    (B, T), (B, T) -> (B, T)
    q is the `quantile` of delta over unmasked tokens (linear interpolation), at least 1e-6.
    Raises ValueError if no token is unmasked.
    """
    mask = mask.bool()
    if not mask.any():
        raise ValueError("every token is masked: nothing can be weighed (is max_new_tokens too small, or was the completion cut?)")
    # Why divide by q: it turns a disagreement into a comparison with the batch, 1 where the most disputed 5 % begin. So
    # gamma means the same for var (nats squared), range (nats) and prob (no unit). At gamma = 1, a token at q weighs 1/2; at the
    # paper's .01 it weighs .99, and because of the cap no token weighs less than 1 / (1 + .01 * 10) = .91: the floor acts
    # only above gamma = 9.9. If more than 95 % of the tokens agree exactly, q is 1e-6, and any other above 1e-5 is at the cap.
    # The trap: a disputed token is often the very one on which the reference has something to teach.
    scale = delta[mask].quantile(quantile).clamp(min=1e-6)
    weights = (1.0 / (1.0 + gamma * (delta / scale).clamp(max=cap))).clamp(min=floor)
    return torch.where(mask, weights, 1.0)


@torch.no_grad()
def sequence_weights(delta: Tensor, gamma: float) -> Tensor:
    """exp(-gamma delta): in (0, 1]. It is not divided by a quantile, so here the unit of delta matters.

    (B,) -> (B,)
    """
    return torch.exp(-gamma * delta)


@torch.no_grad()
def coefficients(mask: Tensor, weights: Tensor, normalizer: str = "batch") -> Tensor:
    """The coefficient c_bt of each token: weighted_mean = sum over b, t of c_bt D_bt.

    (B, T), (B, T) -> (B, T)
    "batch":     c_bt = m_bt w_bt / S,                 S   = sum over the whole batch of m w
    "sequence":  c_bt = m_bt w_bt / (B max(S_b, 1)),   S_b = sum over sequence b of m w            (the official form)
    They depend on masks and weights only, so they are known before the first backward, and a step may be cut into
    micro-batches in any way: the parts add up to the same sum. If all weights are 0 (they underflow), so is all of c.
    Raises ValueError if every token is masked, or for an unknown normalizer.
    """
    # The trap: with "sequence", a weight that all tokens of a sequence share is in both sums, and cancels. Two tokens
    # of D = 3: at weight 1, (3 + 3) / (1 + 1) = 3; at weight .5, (.5 * 3 + .5 * 3) / (.5 + .5) = 3 again.
    # Only when S_b < 1 does max() step in, and the mean falls off a cliff: at weight .25 it is (.75 + .75) / 1 = 1.5.
    # With "batch" all sequences share one denominator, and a sequence of half the weight has half the say.
    masked_weights = torch.where(mask.bool(), weights, 0.0)
    if not mask.bool().any():
        raise ValueError("every token is masked: the loss would be 0/0 (is max_new_tokens too small, or was the completion cut?)")
    if normalizer == "batch":
        if not masked_weights.any():
            return masked_weights
        return masked_weights / masked_weights.sum()
    if normalizer == "sequence":
        return masked_weights / masked_weights.sum(-1, keepdim=True).clamp(min=1.0) / len(masked_weights)
    raise ValueError(f"normalizer must be batch or sequence, got {normalizer!r}")


def weighted_mean(per_token: Tensor, mask: Tensor, weights: Tensor, normalizer: str = "batch") -> Tensor:
    """Sum m w D / sum m w over the batch, or the official mean of per-sequence means.

    (B, T), (B, T), (B, T) -> ()
    For notebooks, tests and ports. Training takes `coefficients` once a step (unisd.weigh), and unisd.objective sums
    coefficient times D, which is the same.
    Differentiable in per_token, and in nothing else: a token's gradient is its coefficient.
    """
    # A masked token may hold nan or inf (a pad position): forget it, do not multiply it by 0.
    per_token = torch.where(mask.bool(), per_token, 0.0)
    return (per_token * coefficients(mask, weights, normalizer)).sum()


if __name__ == "__main__":  # a hand-sized example for a pocket calculator; docs/by-hand.md shows its output
    cells = lambda numbers, form: "".join(f"{number:{form}}" for number in numbers.flatten().tolist())
    by_token = [[-0.1, -0.1, -0.1], [-1.0, -2.0, -3.0], [-0.2, -0.2, -0.2], [-0.5, -2.0, -3.5], [-3.0, -2.0, -1.0]]
    readings, mask = torch.tensor(by_token).T.unsqueeze(1), torch.ones(1, 5)  # (K = 3, B = 1, T = 5)
    token, sequence = (disagreement(readings, mask, level, "var") for level in ("token", "sequence"))
    print("One answer of five tokens, read under K = 3 contexts: the log-probability of each written token\n")
    print("             token 1  token 2  token 3  token 4  token 5      mean")
    for k in range(3):
        print(f"context {k + 1}  {cells(readings[k], '9.1f')}{readings[k].mean():10.2f}")
    print(f"variance   {cells(token, '9.2f')}{sequence.item():10.2f}")
    for gamma in (1.0, 0.01):
        weights = token_weights(token, mask, gamma), sequence_weights(sequence, gamma)
        print(f"weight     {cells(weights[0], '9.3f')}{cells(weights[1], '10.3f')}   gamma {gamma:g}")
    print("Tokens: sum of squares / 2;  1 / (1 + gamma * variance / q), 95 % quantile q = 1 + 0.8 * (2.25 - 1) = 2")
    print("Means:  sum of squares / 3;  exp(-gamma * variance)")
    print("Notice: token 4 counts half. The sequence looks undisputed, because tokens 2 and 5 cancel in the mean.\n")

    per_token, mask = torch.tensor([[1.0, 1.0], [3.0, 3.0]], requires_grad=True), torch.ones(2, 2)
    weights = {w: torch.tensor([[1.0, 1.0], [w, w]]) for w in (1.0, 0.5, 0.25)}
    print("Two answers of two tokens, D = 1 1 and D = 3 3; the weight w of the second falls:\n")
    print(f"w                    {cells(torch.tensor([*weights]), '8.2f')}")
    for name, formula in [("batch", "(2 + 6 w) / (2 + 2 w)"), ("sequence", "(2 / 2 + 6 w / max(2 w, 1)) / 2")]:
        means = torch.stack([weighted_mean(per_token, mask, weights[w], name) for w in weights])
        print(f"normalizer {name:10}{cells(means, '8.2f')}   {formula}")
    print("Notice: per sequence, 0.5 changes nothing: 6 w / 2 w = 3 for any w, until 2 w < 1 breaks it.\n")

    (gradient,) = torch.autograd.grad(weighted_mean(per_token, mask, weights[0.5]), per_token)
    print(f"Gradient of the batch mean on the four D at w = 0.50:{cells(gradient, '6.2f')}")
    print("Notice: it is the coefficient w / (2 + 2 w), a constant. Nothing flows into the weights.")
