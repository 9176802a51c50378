"""reading.py - where tokens become states, and states become log-probabilities.

What: a model is read as *hidden states* (tokens, H), one per completion token: the state that predicts it. The
vocabulary head is applied later, a chunk of tokens at a time, and each chunk's gradient is taken before the next chunk
exists, so no tensor of B*T*V is ever made. There is no second, "memory-efficient" version that could drift from this
one.

Not like the official code: one path instead of 7 to 15 tensors of B*T*V; rows are padded on the right, where a causal
model cannot see it, so no mask and no position ids can be wrong; padded vocabulary is cut off, never given mass.

Depends on torch, losses.py.   Try it:  python -m pytest tests/test_unisd.py -q
Shapes: B sequences, T completion tokens, V vocabulary, H hidden size; N = unmasked tokens, all sequences end to end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losses import token_logps


@dataclass
class Head:
    """The vocabulary head. Only its first `vocab` rows are used: padded vocabulary (Qwen2.5 has some) cannot be given
    mass.
    """

    weight: Tensor  # (V or more, H)
    vocab: int  # V: how many tokens the tokenizer has
    bias: Tensor | None = None  # (V or more,)
    softcap: float | None = None  # Gemma 2: logits = cap * tanh(logits / cap)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V), in the matmul's dtype. Training goes through ThroughHead instead, which also takes the
        gradient.
        """
        dtype = self.matmul_dtype(hidden)
        bias = None if self.bias is None else self.bias[: self.vocab].to(dtype)
        return nn.functional.linear(hidden.to(dtype), self.weight[: self.vocab].to(dtype), bias)

    def logps(self, logits: Tensor, temperature: float) -> Tensor:
        """(n, V) raw logits -> log-probabilities. The only place where the fp32 upcast and a temperature happen."""
        # bf16 log-probabilities are off by up to 0.09 nats at V = 152k: go wide *before* the softmax. float64 stays
        # float64.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (logits / temperature if temperature != 1.0 else logits).log_softmax(-1)

    @staticmethod
    def matmul_dtype(hidden: Tensor) -> torch.dtype:
        kind = hidden.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def head_of(model: nn.Module, vocab: int) -> Head:
    """The model's own head; references to its parameters, not copies."""
    linear = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Head(linear.weight, vocab, getattr(linear, "bias", None), softcap)


def read(model: nn.Module, prompts: list[list[int]], ids: Tensor, mask: Tensor) -> Tensor:
    """The final-layer states that *predict* each unmasked completion token. B prompts, (B, T), (B, T) -> (N, H), row
    after row.

    Rows are prompt + completion, padded on the right: a causal model cannot see the padding, so no attention mask and
    no position ids are needed, and how much padding a batch has cannot change a result. The state at position i
    predicts token i + 1: hence the - 1.
    """
    lengths = mask.sum(1).tolist()
    rows = [p + c[:n] for p, c, n in zip(prompts, ids.tolist(), lengths, strict=True)]
    width = max(map(len, rows))
    tokens = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=ids.device)
    states = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state  # (B, width, H)
    row = torch.tensor([b for b, n in enumerate(lengths) for _ in range(n)], device=ids.device)
    col = torch.tensor(
        [len(p) - 1 + t for p, n in zip(prompts, lengths, strict=True) for t in range(n)], device=ids.device
    )
    return states[row, col]


def passes(lengths: list[int], budget: int) -> list[list[int]]:
    """Row numbers, shortest first, cut into groups of at most `budget` tokens counting padding. Every group has at
    least one row.
    """
    groups, order = [], sorted(range(len(lengths)), key=lengths.__getitem__)
    for i in order:
        if not groups or (len(groups[-1]) + 1) * lengths[i] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def chunks(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


@torch.no_grad()
def sampled_logps(hidden: Tensor, ids: Tensor, head: Head, temperature: float, chunk: int) -> Tensor:
    """log p(y_t) of given tokens, chunk by chunk. (N, H), (N,) -> (N,). All that agreement and the contrast's negative
    ever need.
    """
    return torch.cat(
        [token_logps(head.logps(head.logits(hidden[s]), temperature), ids[s]) for s in chunks(len(hidden), chunk)]
    )


class ThroughHead(torch.autograd.Function):
    """sum over chunks of terms(hidden @ weight.T + bias): the gradient of each chunk is taken before the next chunk
    exists.

    The head is linear, so its backward is two products, written out below; the gradient with respect to one chunk's
    *logits* comes from autograd, so every formula of losses.py stands once. Peak memory: a few tensors of (chunk, V),
    whatever N is.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, vocab, terms, chunk, values):
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        dtype = Head.matmul_dtype(hidden)  # bf16 under autocast, else the model's own
        w, b = weight[:vocab].to(dtype), None if bias is None else bias[:vocab].to(dtype)
        grads = [
            torch.zeros_like(x) if need else None
            for x, need in zip((hidden, weight, bias), (need_h, need_w, need_b), strict=True)
        ]
        total, kept = 0.0, []
        with torch.autocast(hidden.device.type, enabled=False):
            for s in chunks(len(hidden), chunk):
                h = hidden[s].to(dtype)
                logits = nn.functional.linear(h, w, b).requires_grad_(need_h or need_w or need_b)
                with torch.enable_grad():
                    part, out = terms(logits, s)
                total = total + part.detach()
                kept.append(out)
                if logits.requires_grad and part.requires_grad:
                    (g,) = torch.autograd.grad(part, logits)
                    if need_h:
                        grads[0][s] = g @ w
                    if need_w and dtype == weight.dtype:  # in place: no second tensor of the head's size
                        grads[1][:vocab].addmm_(g.T, h)
                    elif need_w:
                        grads[1][:vocab] += g.T @ h
                    if need_b:
                        grads[2][:vocab] += g.sum(0)
        values.update({k: torch.cat([out[k] for out in kept]) for k in kept[0]})
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        # Usually upstream is exactly 1 (loss.backward()): do not copy a gradient of the head's size to multiply it by
        # that.
        return *(g if g is None or upstream == 1 else g * upstream for g in ctx.saved_tensors), None, None, None, None
