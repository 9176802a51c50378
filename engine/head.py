"""head.py - eq. 1 at a real vocabulary: the same `unisd.objective`, a few tokens at a time.

A vocabulary head turns a state of H = 896 numbers into V = 151,936 logits. Written the obvious way, a step of N = 4,000 tokens
makes a dozen tensors of N*V numbers: 2.4 GB each. Here the head is applied to a *chunk* of tokens, the chunk's gradient is
taken at once, and only then is the next chunk made: beyond a chunk, memory does not grow. The formula stays in unisd.py, once; this
file exists so that nobody has to write it a second time to save memory.

Three sizes, each a multiple of the next (`tokens_per_chunk`):
    chunk   tokens whose logits the student's head makes with one matrix product; their gradient goes back through it at once
    side    tokens whose logits the teacher's head makes, side by side with the student's; no gradient, so fewer are kept
    piece   tokens for which the formula is evaluated: it makes a dozen tensors of (piece, V), so this is the small one
For V = 151,936 they are 256, 128 and 8 tokens: 155 MB of the student's logits, 78 MB of the teacher's, 5 MB a tensor inside the
formula. For the tiny model's V = 776 they are 51,520, 25,760 and 1,610: a whole step (600 tokens) is a single piece. On CUDA
they are 512, 256 and 128: a piece of 8 gives a large card so little to do that it waits for Python (docs/cost.md has the times).

Depends on torch, losses.py, unisd.py.   Try it:  python -m pytest tests/test_unisd.py -q
Shapes: V vocabulary, H hidden size; N the unmasked tokens of all sequences, end to end; n any piece of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from losses import token_logps
from unisd import Mechanisms, Tokens, feature_matching, objective


@dataclass
class Head:
    """The vocabulary head. Only its first `vocab` rows are used: padded vocabulary (Qwen2.5 has some) cannot be given mass."""

    weight: Tensor  # (V or more, H)
    vocab: int  # V: how many tokens the tokenizer has
    bias: Tensor | None = None  # (V or more,)
    softcap: float | None = None  # Gemma 2: logits = cap * tanh(logits / cap)
    scale: float = 1.0  # before the cap. Granite: logits / logits_scaling; Cohere: logits * logit_scale

    def __call__(self, states: Tensor, temperature: float = 1.0) -> Tensor:
        """Whole log-probabilities at once, for a few tokens; no gradient reaches the head's weights. (n, H) -> (n, V)"""
        ready = self.ready(states)
        return ready.logps(ready.logits(states), temperature)

    def detach(self) -> "Head":
        """The same weights without gradient; it keeps pointing at them when a model's parameters are swapped back."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def ready(self, states: Tensor) -> "Head":
        """This head cut to the vocabulary and cast for these states' matmul (bf16 under autocast), once and not for every chunk."""
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        cast = lambda x: None if x is None else x.detach()[: self.vocab].to(dtype)
        return replace(self, weight=cast(self.weight), bias=cast(self.bias))

    def logits(self, states: Tensor) -> Tensor:
        """Through a ready head. (n, H) -> (n, V)"""
        return nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias)

    def logps(self, logits: Tensor, temperature: float) -> Tensor:
        """Raw logits -> log-probabilities. The only place where the fp32 upcast and a temperature happen. (n, V) -> (n, V)"""
        # Wide before the softmax: a bf16 log-softmax is off by up to 0.09 nats at V = 152k. What stays under autocast is the
        # rounding of the logits themselves, about 0.01 nats on average. float64 stays float64.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (logits / temperature if temperature != 1.0 else logits).log_softmax(-1)


def head_of(model: nn.Module, vocab: int) -> Head:
    """The model's own head; references to its parameters, not copies."""
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    factor = lambda name: getattr(config, name, None) or 1.0
    scale = factor("logit_scale") * factor("lm_head_multiplier") / factor("logits_scaling")
    return Head(linear.weight, vocab, getattr(linear, "bias", None), getattr(config, "final_logit_softcapping", None), scale)


def agree(ours: Tensor, theirs: Tensor, otherwise: str) -> None:
    """Raises ValueError if two ways to the same logits differ by 5 % of their spread (rounding: 1e-5 in fp32, 1e-2 in bf16)."""
    if not theirs.isfinite().all():
        raise ValueError("its logits are not finite: its weights are broken")
    ours, theirs = (x.float().log_softmax(-1) for x in (ours, theirs))
    off = (ours - theirs).norm() / (theirs - theirs.mean(-1, keepdim=True)).norm()
    if not off < 0.05:
        raise ValueError(f"{otherwise} (off by {100 * off:.0f} %)")


@torch.no_grad()
def check_head(model: nn.Module, vocab: int, prompt: list[int]) -> None:
    """Do states and head together say what the model itself says, whatever comes later in a row? Raises ValueError if not."""
    ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
    head, decoder = head_of(model, vocab), model.get_decoder()
    states = decoder(input_ids=torch.cat([ids, ids[:, :3]], 1), use_cache=False).last_hidden_state[0, : len(prompt)]
    # Asked about states so large that the model is very sure (logits of 30): there a soft cap of any name shows.
    large = 30 / (head.scale * head.ready(states).logits(states)).abs().max()
    hook = decoder.register_forward_hook(lambda _, args, out: setattr(out, "last_hidden_state", out.last_hidden_state * large))
    try:
        theirs = model(input_ids=ids, use_cache=False).logits[0, :, :vocab]
    finally:
        hook.remove()
    agree(head(states * large), theirs, "it scales or changes its logits in a way that engine/head.py does not know")


def chunks(n: int, size: int) -> list[slice]:
    """n things in slices of at most `size`: chunks(5, 2) = 0:2, 2:4, 4:5. Of nothing it is one empty slice, 0:0."""
    return [slice(i, min(i + size, n)) for i in range(0, max(n, 1), size)]


def tokens_per_chunk(chunk: int, vocab: int, cuda: bool = False) -> tuple[int, int, int]:
    """-> (chunk, side, piece), see the top of the file. `chunk` 0 chooses by the vocabulary, else all three are `chunk`.

    A matrix product wants many tokens: it reads the whole head for each chunk, and the student's gradient of the head is
    written once a chunk. A formula wants few, on a CPU; on a GPU enough to hide what starting an operation costs. By the
    vocabulary: about 40 million logits (160 MB in fp32), half, a 32nd; on CUDA about 80 million, half, a quarter.
    """
    if chunk:
        return chunk, chunk, chunk
    few = max(1, 1_250_000 // vocab)
    return (64 * few, 32 * few, 16 * few) if cuda else (32 * few, 16 * few, few)


@torch.no_grad()
def each_token(states: Tensor, head: Head, temperature: float, chunk: int, measure: Callable) -> Tensor:
    """measure(log-probs (n, V), which of the N tokens) -> (n,), a chunk at a time, without gradient. (N, H) -> (N,)"""
    head, found = head.ready(states), []
    size, _, piece = tokens_per_chunk(chunk, head.vocab, states.is_cuda)
    for block in chunks(len(states), size):
        logits = head.logits(states[block])
        for part in chunks(len(logits), piece):
            which = slice(block.start + part.start, block.start + part.stop)
            found.append(measure(head.logps(logits[part], temperature), which))
    return torch.cat(found)


def sampled_logps(states: Tensor, ids: Tensor, head: Head, temperature: float, chunk: int) -> Tensor:
    """log p(y_t) of given tokens: all that agreement and the contrast's negative ever need. (N, H), (N,) -> (N,)"""
    return each_token(states, head, temperature, chunk, lambda logps, which: token_logps(logps, ids[which]))


def chunked_objective(
    student: Tensor, head: Head, teacher: Tensor | None, teacher_head: Head | None, tokens: Tokens, m: Mechanisms, chunk: int = 0
) -> tuple[Tensor, dict]:
    """`unisd.objective`, and `feature_matching` where it is on, from states. -> (loss (), {name: (N,)} without gradient)

    student (N, H) with gradient; teacher (N, H) and its head where a teacher is asked. Equal to the objective on whole tensors,
    in value and gradient, whatever the chunk: to 1e-12 in float64. With an identity head it eats logits.
    """
    asked = bool(m.w_div or m.w_contrast)
    loss, values = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32)), {}

    def terms(logits: Tensor, teacher_logits: Tensor | None, which: slice) -> tuple[Tensor, dict]:
        with torch.no_grad():
            goal = speaker.logps(teacher_logits, m.distill_temperature) if asked else None
        return objective(head.logps(logits, m.distill_temperature), goal, tokens[which], m)

    if any(weight for name, weight in vars(m).items() if name.startswith("w_") and name != "w_match"):  # matching reads no words
        speaker = teacher_head.ready(student) if asked else None
        loss, values = through_head(student, head, terms, chunk, teacher if asked else None, speaker)
    if m.w_match:
        part, matched = feature_matching(student, teacher, tokens, m)
        loss, values = loss + part, values | matched
    return loss, values


def through_head(
    states: Tensor, head: Head, terms: Callable, chunk: int, teacher: Tensor | None = None, teacher_head: Head | None = None
) -> tuple[Tensor, dict]:
    """Sum over pieces of a loss on logits that are never all there at once. -> (loss (), {name: (N,)} without gradient)

    states (N, H); teacher (N, H) and its *ready* head, without gradient. terms(logits (n, V), the teacher's logits (n, V) or
    None, which of the N tokens) -> (loss (), {name: (n,)}).
    The gradient of a chunk is taken before the next chunk exists: with respect to its *logits* by autograd, piece by piece, so
    every formula stands once, and from there by hand, because the head is linear: two matrix products. Peak memory: a tensor of
    (chunk, V), one of (side, V) and a dozen or two of (piece, V), whatever N is. Under bf16 autocast there are also a cast of
    each head and one product of the head's size.
    """
    values: dict = {}
    if not torch.is_grad_enabled():
        # A custom function is asked for gradients by what its inputs want, whatever no_grad says.
        states, head = states.detach(), head.detach()
    return _ThroughHead.apply(states, head.weight, head.bias, head, terms, chunk, teacher, teacher_head, values), values


class _ThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, head, terms, chunk, teacher, teacher_head, values):
        need_states, need_weight, need_bias = ctx.needs_input_grad[:3]
        ready = head.ready(states)
        w, same_type = ready.weight, ready.weight.dtype == weight.dtype
        grad_states = torch.empty_like(states) if need_states else None  # every row is written below
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        total, kept = 0.0, []
        size, side, piece = tokens_per_chunk(chunk, head.vocab, states.is_cuda)
        with torch.autocast(states.device.type, enabled=False):
            for block in chunks(len(states), size):
                h = states[block].to(w.dtype)
                logits, teacher_logits = ready.logits(h), None
                for part in chunks(len(h), piece):
                    # Two ways to count tokens: `part` within the chunk, `which` within all N.
                    which = slice(block.start + part.start, block.start + part.stop)
                    begin = part.start % side  # where in the teacher's side block, which is made anew whenever this is 0
                    if teacher is not None and begin == 0:
                        teacher_logits = None  # freed before the next ones are made
                        teacher_logits = teacher_head.logits(teacher[which.start : min(which.start + side, block.stop)])
                    leaf = logits[part].detach().requires_grad_(need_states or need_weight or need_bias)
                    with torch.enable_grad():  # no name for the teacher's piece: as a view it would keep its whole block alive
                        loss, out = terms(leaf, None if teacher is None else teacher_logits[begin : begin + piece], which)
                    total = total + loss  # without a graph: here gradients are off
                    kept.append(out)
                    if loss.requires_grad:
                        # The logits have served: their gradient takes their place.
                        (logits[part],) = torch.autograd.grad(loss, leaf)
                    else:
                        logits[part] = 0.0
                # d loss / d states = (d loss / d logits) W, and d loss / d W = (d loss / d logits)^T states.
                if need_states:
                    grad_states[block] = logits @ w
                if need_weight and same_type:  # in place: no second tensor of the head's size
                    grad_weight[: head.vocab].addmm_(logits.T, h)
                elif need_weight:
                    grad_weight[: head.vocab] += logits.T @ h
                if need_bias:
                    grad_bias[: head.vocab] += logits.sum(0)
                del logits, teacher_logits, leaf, loss  # before the next chunk's are made; `leaf` is a view
        values.update({name: torch.cat([out[name] for out in kept]) for name in kept[0]})
        ctx.save_for_backward(grad_states, grad_weight, grad_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        # Usually upstream is exactly 1 (loss.backward()): then a gradient of the head's size is not copied to be scaled.
        scaled = [g if g is None or upstream == 1 else g * upstream for g in ctx.saved_tensors]
        return *scaled, None, None, None, None, None, None
