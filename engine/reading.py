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

from collections.abc import Callable
from dataclasses import dataclass, replace

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

    def detach(self) -> "Head":
        """The same weights without gradient; it keeps pointing at them when a model's parameters are swapped back."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def ready(self, hidden: Tensor) -> "Head":
        """This head cut to the vocabulary and cast for these states' matmul (bf16 under autocast), once instead of per
        chunk.
        """
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        cast = lambda x: None if x is None else x.detach()[: self.vocab].to(dtype)
        return Head(cast(self.weight), self.vocab, cast(self.bias), self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V) through a ready head."""
        return nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def logps(self, logits: Tensor, temperature: float) -> Tensor:
        """(n, V) raw logits -> log-probabilities. The only place where the fp32 upcast and a temperature happen."""
        # Wide before the softmax: a bf16 log-softmax is off by up to 0.09 nats at V = 152k. What stays under autocast is the
        # rounding of the logits themselves, about 0.01 nats on average. float64 stays float64.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (logits / temperature if temperature != 1.0 else logits).log_softmax(-1)


def head_of(model: nn.Module, vocab: int) -> Head:
    """The model's own head; references to its parameters, not copies."""
    linear = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Head(linear.weight, vocab, getattr(linear, "bias", None), softcap)


@torch.no_grad()
def check_head(model: nn.Module, vocab: int, prompt: list[int]) -> None:
    """Do states and head together say what the model itself says? Raises ValueError if not (some models scale their logits)."""
    ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
    theirs = model(input_ids=ids, use_cache=False).logits[0, -1, :vocab].float().log_softmax(-1)
    states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, -1:]
    head = head_of(model, vocab).ready(states)
    off = (head.logps(head.logits(states), 1.0)[0] - theirs).abs().max().item()
    if not off < 0.1:
        raise ValueError(
            f"--model: its logits are not its head applied to its last states (log-probs differ by {off:.2f}): "
            "it scales or changes them in a way that reading.Head does not know; add it there"
        )


def read(model: nn.Module, prompts: list[list[int]], ids: Tensor, mask: Tensor) -> Tensor:
    """The final-layer states that *predict* each unmasked completion token. B prompts, (B, T), (B, T) -> (N, H), row
    after row.

    The mask is 1 from a row's first token on, then 0, as completion_mask makes it. Rows are prompt + completion, padded
    on the right: a causal model cannot see the padding, so no attention mask and no position ids are needed, and how
    much padding a batch has cannot change a result. The state at position i predicts token i + 1: hence the - 1.
    """
    lengths = mask.sum(1).tolist()
    rows = [p + c[:n] for p, c, n in zip(prompts, ids.tolist(), lengths, strict=True)]
    width = max(map(len, rows))
    tokens = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=ids.device)
    states = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state  # (B, width, H)
    where = [(b, len(p) - 1 + t) for b, (p, n) in enumerate(zip(prompts, lengths, strict=True)) for t in range(n)]
    row, col = torch.tensor(where, dtype=torch.long, device=ids.device).reshape(-1, 2).unbind(1)
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


@dataclass
class Reading:
    """One set of prompts under which answers are read, and what is kept of each token: its state, or its log-probability."""

    prompts: list[list[int]]  # B prompts
    keep: Callable[[Tensor, Tensor], Tensor]  # states (n, H), ids (n,) -> (n,) or (n, H)
    rows: list[int]  # which of the B sequences


@torch.no_grad()
def score(
    model: nn.Module, readings: list[Reading], ids: Tensor, mask: Tensor, budget: int, tally: dict | None = None
) -> list[Tensor]:
    """Read the same answers under several sets of prompts, in as few passes as the budget allows, whatever their number.
    -> per reading (B, T) or (B, T, H), 0 where masked.

    Rows of all readings share passes, sorted by length: little is padding. tally, if given, counts "read" tokens and
    "padded" ones.
    """
    counts, mask = mask.sum(1).tolist(), mask.bool()
    rows = [(r, i) for r in range(len(readings)) for i in readings[r].rows]  # reading, sequence
    lengths = [len(readings[r].prompts[i]) + counts[i] for r, i in rows]
    out: list = [None] * len(readings)
    for some in passes(lengths, budget):
        group = sorted(rows[j] for j in some)  # the rows of one reading side by side
        of = [i for _, i in group]
        states = read(model, [readings[r].prompts[i] for r, i in group], ids[of], mask[of])
        for r in sorted({r for r, _ in group}):
            mine = [i for s, i in group if s == r]
            n = sum(counts[i] for i in mine)
            here, states = states[:n], states[n:]
            kept = readings[r].keep(here, ids[mine][mask[mine]])
            if out[r] is None:
                out[r] = kept.new_zeros(*mask.shape, *kept.shape[1:])
            place = torch.zeros_like(mask)
            place[mine] = mask[mine]
            # `mine` is in ascending order, so the flat order of `place` is the order of `kept`.
            out[r][place] = kept
        if tally is not None:
            tally["read"] = tally.get("read", 0) + sum(lengths[j] for j in some)
            tally["padded"] = tally.get("padded", 0) + max(lengths[j] for j in some) * len(some)
    wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    return [torch.zeros(mask.shape, dtype=wide, device=ids.device) if o is None else o for o in out]  # None: no rows


def tokens_per_chunk(chunk: int, vocab: int) -> tuple[int, int, int]:
    """How many tokens go through the student's head together, through the teacher's beside it, and through a formula.
    -> (chunk, side, piece), each a multiple of the next.

    A matrix product wants many tokens: it reads the whole head for each chunk, and the student's gradient of the head is
    written once a chunk. A formula makes a dozen or two tensors of (piece, V) and wants few. chunk 0 = about 40 million
    logits (160 MB in fp32), half of that, and a thirty-second.
    """
    if chunk:
        return chunk, chunk, chunk
    piece = max(1, 1_250_000 // vocab)
    return 32 * piece, 16 * piece, piece


@torch.no_grad()
def each_token(
    hidden: Tensor, head: Head, temperature: float, chunk: int, what: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """what(log-probs (n, V), slice of the N tokens) -> (n,), for all tokens, a chunk at a time, without gradient. (N, H)
    -> (N,).
    """
    head = head.ready(hidden)
    size, _, piece = tokens_per_chunk(chunk, head.vocab)
    out = []
    for s in chunks(len(hidden), size):
        logits = head.logits(hidden[s])
        for q in chunks(len(logits), piece):
            out.append(what(head.logps(logits[q], temperature), slice(s.start + q.start, s.start + q.stop)))
    return torch.cat(out) if out else hidden.new_zeros(0)


def sampled_logps(hidden: Tensor, ids: Tensor, head: Head, temperature: float, chunk: int) -> Tensor:
    """log p(y_t) of given tokens. (N, H), (N,) -> (N,). All that agreement and the contrast's negative ever need."""
    return each_token(hidden, head, temperature, chunk, lambda logps, s: token_logps(logps, ids[s]))


def through_head(
    hidden: Tensor,
    head: Head,
    terms: Callable[[Tensor, Tensor | None, slice], tuple],
    chunk: int,
    beside: tuple[Tensor, Head] | None = None,
) -> tuple[Tensor, dict]:
    """Sum over chunks of a loss on logits that are never all there at once. -> (loss (), {name: (N,)} without
    gradient).

    hidden (N, H); beside: the states (N, H) and the ready head of a teacher who needs no gradient. terms(logits (n, V),
    the teacher's logits (n, V) or None, slice of the N tokens) -> (loss (), {name: (n,)}).
    The gradient of a chunk is taken before the next chunk exists: with respect to its *logits* by autograd, piece by
    piece, so every formula of losses.py stands once, and from there by hand, because the head is linear: two products.
    Peak memory: a tensor of (chunk, V), one of (side, V) and a dozen or two of (piece, V), whatever N is. Under bf16
    autocast there are also a cast of each head and one product of the head's size.
    """
    values: dict = {}
    if not torch.is_grad_enabled():
        # A custom function is asked for gradients by what its inputs want, whatever no_grad says.
        hidden, head = hidden.detach(), head.detach()
    return _ThroughHead.apply(hidden, head.weight, head.bias, head, terms, chunk, beside, values), values


class _ThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head, terms, chunk, beside, values):
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        ready = head.ready(hidden)
        w, same_type = ready.weight, ready.weight.dtype == weight.dtype
        grad_h = torch.zeros_like(hidden) if need_h else None
        grad_w = torch.zeros_like(weight) if need_w else None
        grad_b = torch.zeros_like(bias) if need_b else None
        total, kept = 0.0, []
        size, side, piece = tokens_per_chunk(chunk, head.vocab)
        with torch.autocast(hidden.device.type, enabled=False):
            for s in chunks(len(hidden), size):
                h = hidden[s].to(w.dtype)
                logits, others = ready.logits(h), None
                for q in chunks(len(h), piece):
                    of = slice(s.start + q.start, s.start + q.stop)
                    at = q.start % side  # place in the teacher's block, which is refilled at 0
                    if beside and at == 0:
                        others = None  # before the next ones are made
                        others = beside[1].logits(beside[0][of.start : min(of.start + side, s.stop)])
                    some = logits[q].detach().requires_grad_(need_h or need_w or need_b)
                    with torch.enable_grad():
                        part, out = terms(some, others[at : at + piece] if beside else None, of)
                    total = total + part.detach()
                    kept.append(out)
                    if some.requires_grad and part.requires_grad:
                        # The logits have served: their gradient takes their place.
                        (logits[q],) = torch.autograd.grad(part, some)
                    else:
                        logits[q] = 0.0
                if need_h:
                    grad_h[s] = logits @ w
                if need_w and same_type:  # in place: no second tensor of the head's size
                    grad_w[: head.vocab].addmm_(logits.T, h)
                elif need_w:
                    grad_w[: head.vocab] += logits.T @ h
                if need_b:
                    grad_b[: head.vocab] += logits.sum(0)
                del logits, others, some, part  # before the next chunk's are made; `some` is a view
        values.update({k: torch.cat([out[k] for out in kept]) for k in kept[0]})
        ctx.save_for_backward(grad_h, grad_w, grad_b)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        # Usually upstream is exactly 1 (loss.backward()): then a gradient of the head's size is not copied to be
        # scaled.
        scaled = [g if g is None or upstream == 1 else g * upstream for g in ctx.saved_tensors]
        return *scaled, None, None, None, None, None
