"""agreement.py - how far may we trust this token?

What: one teacher reads the *same* sampled tokens under K different contexts. Where the K readings differ, the signal is
weak, and the token (or the whole sequence) counts less. UniSD (arXiv 2605.06597), eq. 2:

    l_t^k = log p_teacher(y_t | x, c_k, y_<t)          (K, B, T)  the sampled token's log-prob under context k
    token     d_t = A({l_t^k}_k)      w_t = max(1 / (1 + gamma min(d_t / q, cap)), floor)
                                      q   = max(quantile_0.95 of d over unmasked tokens, 1e-6)
    sequence  d   = A({L^k}_k)        w   = exp(-gamma d),    L^k = mean of l_t^k over unmasked tokens
    A = variance or range (max - min)

Not like the official code: there, a sequence's weight multiplies its tokens *and* its own normaliser, so it divides out
(see `coefficients`). Here the normaliser is the whole batch by default; normalizer="sequence" reproduces theirs for
comparison.

Depends on torch only.   Try it:  python -m pytest tests/test_agreement.py -q
Shapes: K contexts, B sequences, T completion tokens. Weights carry no gradient: nothing here does.
"""

import torch
from torch import Tensor


@torch.no_grad()
def disagreement(logps: Tensor, mask: Tensor, level: str, stat: str) -> Tensor:
    """How much K readings of the same tokens differ. (K, B, T), (B, T) -> (B, T) for level "token", (B,) for
    "sequence".

    Variance is unbiased over tokens (divide by K-1) and biased over sequences (divide by K), as in the paper's
    settings. Masked tokens get 0. Raises ValueError for K = 1 with stat "var" (0/0 over tokens, 0 over sequences), and for
    an unknown level or stat.
    """
    if level not in ("token", "sequence") or stat not in ("var", "range"):
        raise ValueError(f"level must be token or sequence and stat var or range, got level={level!r}, stat={stat!r}")
    if stat == "var" and logps.shape[0] < 2:
        raise ValueError(
            f"the variance of {logps.shape[0]} context is undefined: give at least 2 contexts, or use stat range"
        )
    mask = mask.bool()
    # Masked positions may hold anything, inf and nan included; where() forgets them, a multiplication by 0 would not.
    logps = torch.where(mask, logps, torch.zeros_like(logps))
    if level == "sequence":
        logps = logps.sum(-1) / mask.sum(-1).clamp(min=1)  # (K, B)  L^k: mean over the tokens that count
    if stat == "range":
        return logps.amax(0) - logps.amin(0)
    return logps.var(0, unbiased=level == "token")


@torch.no_grad()
def token_weights(
    delta: Tensor, mask: Tensor, gamma: float, *, quantile: float = 0.95, cap: float = 10.0, floor: float = 0.01
) -> Tensor:
    """max(1 / (1 + gamma min(delta / q, cap)), floor). (B, T), (B, T) -> (B, T) in (0, 1]; 1 on masked tokens.

    q is the `quantile` of delta over unmasked tokens (linear interpolation), at least 1e-6: the weight depends on how a
    token compares with the batch, not on the unit of delta. gamma = 0 gives 1 everywhere. Raises ValueError if no token
    is unmasked.
    """
    mask = mask.bool()
    if not mask.any():
        raise ValueError(
            "every token is masked: there is nothing to weigh (is max_new_tokens too small, or was the completion cut?)"
        )
    scale = delta[mask].quantile(quantile).clamp(min=1e-6)
    weights = (1.0 / (1.0 + gamma * (delta / scale).clamp(max=cap))).clamp(min=floor)
    return torch.where(mask, weights, torch.ones_like(weights))


@torch.no_grad()
def sequence_weights(delta: Tensor, gamma: float) -> Tensor:
    """exp(-gamma delta). (B,) -> (B,) in (0, 1]."""
    return torch.exp(-gamma * delta)


@torch.no_grad()
def coefficients(mask: Tensor, weights: Tensor, normalizer: str = "batch") -> Tensor:
    """c with weighted_mean = sum(c * per_token). (B, T), (B, T) -> (B, T). Known before the first backward, so a step
    may be split at will.

    "batch":     c_bt = m_bt w_bt / S,                 S   = sum over the whole batch of m w
    "sequence":  c_bt = m_bt w_bt / (B max(S_b, 1)),   S_b = sum over sequence b of m w            (the official form)

    Why sequence weights cancel in the second: let w_bt = w_b. Then sum_t m w_b D / sum_t m w_b = sum_t m D / sum_t m,
    free of w_b. The factor comes back only once S_b < 1, where the max() turns into a cliff. In the first, w_b stays in
    the numerator, and the denominator is shared: a sequence with half the weight has half the say. Raises ValueError if
    every token is masked, or for an unknown normalizer.
    """
    mw = torch.where(mask.bool(), weights, torch.zeros_like(weights))
    if not mask.bool().any():
        raise ValueError(
            "every token is masked: the loss would be 0/0 (is max_new_tokens too small, or was the completion cut?)"
        )
    if normalizer == "batch":
        return mw / mw.sum()
    if normalizer == "sequence":
        return mw / mw.sum(-1, keepdim=True).clamp(min=1.0) / len(mw)
    raise ValueError(f"normalizer must be batch or sequence, got {normalizer!r}")


def weighted_mean(per_token: Tensor, mask: Tensor, weights: Tensor, normalizer: str = "batch") -> Tensor:
    """Sum m w D / sum m w over the batch, or the official mean of per-sequence means. (B, T)x3 -> (). Differentiable in
    per_token.
    """
    # A masked token may hold nan or inf (a pad position): forget it, do not multiply it by 0.
    return (
        torch.where(mask.bool(), per_token, torch.zeros_like(per_token)) * coefficients(mask, weights, normalizer)
    ).sum()
