"""jax_unisd.py - UniSD's losses, agreement, EMA and whole objective in JAX.

What: the functions of tests/golden/README.md under its names and signatures, as pure functions of arrays; gradients by
jax.grad (of the objective's "loss"). No model, no sampling, no loop: bring your own. JAX is optional: pip install jax
Traps that differ from torch:
  - arrays are immutable: an EMA changes nothing in place, it returns a new tree.
  - there is no no_grad: what a teacher says passes through stop_gradient at the door, or jax.grad walks into it.
  - where() on a result does not keep nan out of the gradient: inputs are replaced *before* anything is computed.
  - at a tie, minimum, maximum and clip give each side half of the gradient, and abs has gradient 1 at 0; torch's clamp
    gives all of it and abs has 0: hence where() in (5) and (9), and x sign(x) for |x|.
  - float64 is off: jax.config.update("jax_enable_x64", True) before the first array, or all is silently float32.
  - shapes are static under jit: no boolean indexing, so the quantile over unmasked tokens is jnp.nanquantile.
  - a value cannot raise under jit: settings are always checked, an empty mask only where its values are known.

Depends on jax only.   Try it, from the root:  python tests/golden/check.py ports.jax_unisd
Shapes: B sequences, T completion tokens, V vocabulary, H hidden size, K contexts, N unmasked tokens, L row length.
"""

import math

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

# --- losses: log-probabilities in, nats out; (..., V) -> (...) --------------------------------------------------------
token_logps = lambda logps, ids: jnp.take_along_axis(logps, ids[..., None], -1)[..., 0]
forward_kl = lambda student, teacher: kl(teacher, student)
reverse_kl = lambda student, teacher: kl(student, teacher)
entropy = lambda logps: -jnp.sum(jnp.exp(logps) * jnp.where(logps == -jnp.inf, 0.0, logps), -1)
wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))


def kl(p, q):
    """KL(p || q); a token that p rules out adds 0."""
    out = p == -jnp.inf
    return jnp.sum(jnp.exp(p) * (jnp.where(out, 0.0, p) - jnp.where(out, 0.0, q)), -1)


def jsd(student, teacher, alpha=0.5):
    """Eq. 7-8. Raises ValueError unless 0 < alpha < 1."""
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must lie strictly between 0 and 1, got {alpha}")
    s, t = (jnp.where(x > -1e30, x, -1e30) for x in (student, teacher))  # logaddexp(-inf, -inf) has no gradient
    m = jnp.logaddexp(math.log1p(-alpha) + s, math.log(alpha) + t)
    return alpha * kl(t, m) + (1.0 - alpha) * kl(s, m)


def top_k_with_tail(student, teacher, k):
    """-> (..., k + 1)x2: the teacher's k likeliest tokens and the sum of the rest."""
    _, top = jax.lax.top_k(teacher, min(k, teacher.shape[-1]))
    in_head = jax.nn.one_hot(top, teacher.shape[-1], dtype=bool).any(-2)
    tail = lambda x: jax.nn.logsumexp(jnp.where(in_head, -1e30, x), -1, keepdims=True)
    return tuple(jnp.concatenate([jnp.take_along_axis(x, top, -1), tail(x)], -1) for x in (student, teacher))


def sampled_reverse_kl(student, teacher):
    """(...)x2 -> (...): value log p_s - log p_t, gradient that value times grad log p_s."""
    ratio = stop_gradient(student - teacher)
    return ratio + ratio * (student - stop_gradient(student))


def clip_tokens(per_token, ceiling):
    """Eq. 9. (...) -> (...)."""
    return per_token if ceiling is None else jnp.where(per_token <= ceiling, per_token, ceiling)


def quantile_ceiling(per_token, mask, q):
    """(B, T)x2 -> (): a quantile of the unmasked values, at least 1e-6, without gradient."""
    return jnp.maximum(jnp.nanquantile(jnp.where(mask > 0, stop_gradient(per_token), jnp.nan), q), 1e-6)


def contrastive(student, positive, negative, margin):
    """Eq. 5. (...)x3 -> (...)."""
    near, far = (x * jnp.sign(x) for x in (student - stop_gradient(positive), student - stop_gradient(negative)))
    return jnp.where(margin + near - far >= 0, margin + near - far, 0.0)


def feature_mse(student, teacher):
    """Eq. 6. (..., H)x2 -> (...), in float32 or wider."""
    return jnp.mean(jnp.square(wide(student) - stop_gradient(wide(teacher))), -1)


# --- agreement, eq. 2: constants for the gradient ---------------------------------------------------------------------
sequence_weights = lambda delta, gamma: jnp.exp(-gamma * stop_gradient(delta))
weighted_mean = lambda per_token, mask, weights, normalizer="batch": jnp.sum(
    coefficients(mask, weights, normalizer) * jnp.where(mask > 0, per_token, 0.0)
)


def some_token(mask):
    if not isinstance(mask, jax.core.Tracer) and not (mask > 0).any():
        raise ValueError("the mask is 0 everywhere: there is no token to average over")


def disagreement(logps, mask, level, stat):
    """(K, B, T), (B, T) -> (B, T) for level "token", (B,) for "sequence". Raises ValueError for var of one context."""
    if level not in ("token", "sequence") or stat not in ("var", "range"):
        raise ValueError(f"level is token or sequence, stat is var or range; got level={level!r}, stat={stat!r}")
    if stat == "var" and len(logps) < 2:
        raise ValueError("stat var needs at least two contexts")
    x = jnp.where(mask > 0, stop_gradient(logps), 0.0)
    if level == "sequence":
        x = x.sum(-1) / jnp.maximum((mask > 0).sum(-1), 1)
    return x.max(0) - x.min(0) if stat == "range" else x.var(0, ddof=1 if level == "token" else 0)


def token_weights(delta, mask, gamma, quantile=0.95, cap=10.0, floor=0.01):
    """(B, T)x2 -> (B, T) in (0, 1]. Raises ValueError if every token is masked."""
    some_token(mask)
    return compared_weights(delta, mask, gamma, quantile, cap, floor)


def compared_weights(delta, mask, gamma, quantile=0.95, cap=10.0, floor=0.01):
    """The same, and 1 everywhere if every token is masked: a budget may read rows without tokens."""
    delta = jnp.where(mask > 0, stop_gradient(delta), 0.0)
    w = 1.0 / (1.0 + gamma * jnp.minimum(delta / quantile_ceiling(delta, mask, quantile), cap))
    return jnp.where(mask > 0, jnp.maximum(w, floor), 1.0)


def coefficients(mask, weights, normalizer="batch"):
    """(B, T)x2 -> (B, T). Raises ValueError if every token is masked, and for another normalizer."""
    some_token(mask)
    mw = jnp.where(mask > 0, stop_gradient(weights), 0.0)
    if normalizer not in ("batch", "sequence"):
        raise ValueError(f"normalizer is batch or sequence, got {normalizer!r}")
    total = mw.sum()  # 0 where all weights underflowed: then nobody has a say
    return (
        mw / jnp.where(total > 0, total, 1.0)
        if normalizer == "batch"
        else mw / jnp.maximum(mw.sum(1, keepdims=True), 1.0) / len(mw)
    )


# --- EMA, eq. 3 -------------------------------------------------------------------------------------------------------
def ema_update(shadow, student, decay):
    """Two trees of arrays -> a new tree, in float32 or wider. It starts as a wide copy of the student's own arrays."""
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must lie in [0, 1], got {decay}")
    return jax.tree.map(lambda old, new: decay * wide(old) + (1.0 - decay) * wide(new), shadow, student)


def half_life(decay, every=1):
    """Optimizer steps until half of the teacher is new."""
    inside = 0.0 < decay < 1.0
    return every * math.log(0.5) / math.log(decay) if inside else math.inf if decay >= 1.0 else 0.0


# --- reading ----------------------------------------------------------------------------------------------------------
def completion_mask(ids, eos):
    """(B, T) -> (B, T): 1 up to and including the first of the end ids."""
    ends = jnp.isin(ids, jnp.asarray(eos)).astype(jnp.int32)
    return (jnp.cumsum(ends, -1) - ends == 0).astype(jnp.int32)


def predicting_states(states, prompt_lengths, mask):
    """(B, L, H), (B,), (B, T) -> (N, H). Not under jit: N is a value."""
    row, t = jnp.nonzero(mask)
    return states[row, prompt_lengths[row] - 1 + t]


def head_logps(states, weight, bias=None, vocab=None, softcap=None, temperature=1.0):
    """(..., H), (R, H), (R,) -> (..., V), softmax in float32 or wider. A weight of None: the states are the logits."""
    logits = wide(states if weight is None else states @ weight[:vocab].T)
    logits = logits if bias is None else logits + bias[:vocab]
    return jax.nn.log_softmax((softcap * jnp.tanh(logits / softcap) if softcap else logits) / temperature, -1)


# --- the objective, eq. 1 and 9 ---------------------------------------------------------------------------------------
def objective(student, teacher, negative, contexts, ids, mask, head, teacher_head, *, vocab, rows=None, **s):
    """One step's loss and its parts. Inputs and settings s: as in tests/golden/README.md. -> {"loss": (), ...}."""
    if s["clip"] and s["clip_quantile"]:
        raise ValueError("clip and clip_quantile are two ceilings for one divergence: set one of them to 0")
    if s["estimator"] == "sampled" and s["divergence"] != "reverse":
        raise ValueError(f"estimator sampled with divergence {s['divergence']}: one token estimates a reverse KL")
    on = mask > 0
    clean = lambda x: None if x is None else jnp.where(on[..., None], x, 0.0)  # before anything is computed
    student, teacher, negative, contexts = map(clean, (student, *map(stop_gradient, (teacher, negative, contexts))))
    ids, teacher_head = jnp.where(on, ids, 0), stop_gradient(teacher_head)
    tau, gamma = s["distill_temperature"], s["gamma"]
    speak = lambda x, tau: head_logps(x, teacher_head, vocab=vocab, temperature=tau)
    written = lambda logps: token_logps(logps, jnp.broadcast_to(ids, logps.shape[:-1]))

    p = head_logps(student, head, vocab=vocab, temperature=tau)
    q = speak(teacher, tau) if s["w_div"] or s["w_contrast"] else None
    if s["w_div"]:
        D = {"forward": forward_kl, "reverse": reverse_kl, "jsd": lambda x, y: jsd(x, y, s["alpha"])}[s["divergence"]]
        pair = top_k_with_tail(p, q, s["top_k"]) if s["estimator"] == "top-k" else (p, q)
        d = sampled_reverse_kl(written(p), written(q)) if s["estimator"] == "sampled" else D(*pair)

    ones = weights = jnp.ones(mask.shape, wide(student).dtype)
    if s["agreement"] != "none" and gamma and s["w_div"] and s["agreement_budget"]:
        unsure = jnp.sum(on * (entropy(q) if s["uncertainty"] == "entropy" else d), 1) / jnp.maximum(on.sum(1), 1)
        _, rows_read = jax.lax.top_k(unsure, math.ceil(min(s["agreement_budget"], 1.0) * len(mask)))
        read = jnp.zeros_like(mask).at[rows_read].set(mask[rows_read])  # a row that is not read keeps weight 1
        delta = disagreement(written(speak(contexts, s["agreement_temperature"])), read, s["agreement"], s["stat"])
        by_row = s["agreement"] == "sequence"
        weights = ones * sequence_weights(delta, gamma)[:, None] if by_row else compared_weights(delta, read, gamma)
    c, a = (coefficients(mask, w, s["normalizer"]) for w in (weights, ones))

    terms = -s["w_nll"] * a * written(p)
    parts = {"weights": weights, "coefficients": c, "nll": -written(p) * on}
    if s["w_div"]:
        ceiling = s["clip"] or (quantile_ceiling(d, mask, s["clip_quantile"]) if s["clip_quantile"] else None)
        terms += s["w_div"] * c * clip_tokens(d, ceiling)
        parts |= {"div": d * on} | ({} if ceiling is None else {"ceiling": jnp.asarray(ceiling)})
    if s["w_contrast"]:
        parts["contrast"] = on * contrastive(written(p), written(q), written(speak(negative, tau)), s["margin"])
        terms += s["w_contrast"] * a * parts["contrast"]
    if s["w_match"]:
        parts["match"] = on * feature_mse(student, teacher)
        terms += s["w_match"] * a * parts["match"]
    return {"loss": terms[slice(*rows) if rows else slice(None)].sum()} | parts
