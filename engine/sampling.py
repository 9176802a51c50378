"""sampling.py - continue a batch of prompts: three engines, one result.

What: Hugging Face `generate` writes the tokens; here stand the three ways to call it, and the one way in which a token
is drawn.

  compact     `generate` with its ordinary cache, interrupted whenever more than a tenth of the rows have finished: their
              cache is dropped and the others go on. A finished row stops costing. Works everywhere.
  static      `generate` with a static cache: one shape for all steps, which CUDA graphs want. Finished rows go on to cost.
  continuous  transformers' continuous batching (paged attention): a finished row makes room for a waiting prompt.

All three use the trained model itself, without a copy, and write the same greedy tokens (tests/test_sampling.py).

A token is drawn by inverting the cumulative distribution at a uniform number that was *given* for this row and position:
the answer of a prompt does not depend on what else is in its batch, on the engine (continuous draws its own numbers,
and is the exception), on how many processes share the work, or on how often a run was resumed.

Depends on torch and transformers.   Try it:  python -m pytest tests/test_sampling.py -q
Shapes: B prompts, W their padded width, T new tokens, V vocabulary.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput

# transformers renamed the argument and the output in the middle of its version 5.
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
FINISHED = 0.1  # compact: largest share of finished rows that a decoding step may carry along


class Draw(LogitsProcessor):
    """Choose the next token, and leave it as the only possible one. Padded vocabulary (Qwen2.5's table is larger than its
    tokenizer) is never chosen.

    noise (B, T) uniform in [0, 1), or None for the likeliest token; column t decides new token t.
    """

    def __init__(self, vocab: int, width: int, temperature: float, noise: Tensor | None):
        self.vocab, self.width, self.temperature, self.noise = vocab, width, temperature, noise

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        real = scores[:, : self.vocab]
        if self.noise is None:
            pick = real.argmax(-1, keepdim=True)
        else:
            # float64: in fp32 a cumulative sum over 150,000 tokens would be off by more than a rare token's probability.
            up_to = (real.double() / self.temperature).softmax(-1).cumsum(-1)  # (B, V)
            at = self.noise[:, input_ids.shape[1] - self.width, None].to(up_to) * up_to[:, -1:]
            # right: the first token whose sum is *above* the number, so a token of probability 0 is never drawn.
            pick = torch.searchsorted(up_to, at, right=True).clamp(max=self.vocab - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, pick, 0.0)


class ManyFinished(StoppingCriteria):
    """Interrupt the batch once more than FINISHED of its rows have ended; `done` (B,) says which."""

    def __init__(self, eos: list[int]):
        self.eos, self.done = eos, False

    def __call__(self, input_ids: Tensor, scores, **_) -> Tensor:
        last = input_ids[:, -1]
        self.done = self.done | torch.isin(last, torch.tensor(self.eos, device=last.device))
        stop = self.done.float().mean() > FINISHED
        return stop.expand(len(last))


def compact(model: nn.Module, ids: Tensor, mask: Tensor, config: GenerationConfig, draw: Draw) -> tuple[list[Tensor], int]:
    """Left-padded prompts (B, W) and their mask -> B rows of new ids, and the number of token positions computed."""
    width, limit = ids.shape[1], config.max_new_tokens
    rows: list[Tensor] = [ids[0]] * len(ids)
    alive, cache, computed = torch.arange(len(ids), device=ids.device), None, 0
    while len(alive):
        before = ids.shape[1]
        many, config.max_new_tokens = ManyFinished(config.eos_token_id), limit - (before - width)
        noise = draw.noise if draw.noise is None else draw.noise[alive]
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([Draw(draw.vocab, width, draw.temperature, noise)]),
            stopping_criteria=StoppingCriteriaList([many]),
            **({CACHE: cache} if cache is not None else {}),
        )
        ids, cache = out.sequences, getattr(out, CACHE)
        computed += len(alive) * (ids.shape[1] - before)
        gone = many.done | (ids.shape[1] - width >= limit)
        for i, row in zip(alive[gone].tolist(), ids[gone], strict=True):
            rows[i] = row[width:]
        stay = (~gone).nonzero().squeeze(1)
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - before)], 1)[stay]
        alive, ids = alive[stay], ids[stay]
        cache.batch_select_indices(stay)
    config.max_new_tokens = limit
    return rows, computed


def static(model: nn.Module, ids: Tensor, mask: Tensor, config: GenerationConfig, draw: Draw) -> tuple[list[Tensor], int]:
    """As `compact`, with a static cache and every row to the end of the longest."""
    config.cache_implementation = "static"
    out = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([draw])
    ).sequences[:, ids.shape[1] :]
    return list(out), out.numel()


def continuous(model: nn.Module, ids: Tensor, mask: Tensor, config: GenerationConfig, draw: Draw) -> tuple[list[Tensor], int]:
    """As `compact`, by `generate_batch`; it draws its own random numbers. Raises ValueError if a token outside the
    tokenizer is written.
    """
    if draw.noise is not None:
        config.do_sample, config.temperature, config.top_k, config.top_p = True, draw.temperature, 0, 1.0
    prompts = [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
    # Pages for these answers and no more: left alone it takes most of the memory that is free, which training needs.
    page = 256
    pages = sum(-(-(len(p) + config.max_new_tokens) // page) for p in prompts)
    how = ContinuousBatchingConfig(block_size=page, num_blocks=pages + 1, max_batch_tokens=max(256, *map(len, prompts)))
    # Requests are named after their order; what comes back is sorted by when it finished.
    out = model.generate_batch(prompts, generation_config=config, continuous_batching_config=how)
    rows = [torch.tensor(out[f"req_{i}"].generated_tokens, device=ids.device) for i in range(len(prompts))]
    if any((row >= draw.vocab).any() for row in rows):
        raise ValueError(
            "--engine continuous wrote a token that the tokenizer does not have (padded vocabulary); use --engine compact"
        )
    return rows, sum(map(len, rows))


ENGINES = {"compact": compact, "static": static, "continuous": continuous}


@contextmanager
def answering(model: nn.Module, config: GenerationConfig):
    """Evaluation mode (no dropout, no gradient checkpointing, which would forbid the KV cache), and no sampling
    defaults of the hub's.

    The model's own generation config is set aside, not only overridden: `generate` fills what a given config leaves at
    its default from the model's, so Qwen's top_p and repetition penalty would come back in.
    """
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)
