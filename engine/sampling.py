"""sampling.py - continue a batch of prompts: how a token is drawn, and how rows that have ended leave the batch.

Hugging Face `generate` goes on token by token with its key-value cache; here stand the two things it does not do. Answers
end at different lengths, and a row that has ended would cost as much as one that has not: `continue_rows` interrupts
`generate` whenever more than a tenth of the rows have ended, drops their share of the cache, and goes on with the others.
And a token is drawn with a random number that was *given* for its row and position (`Draw`), so that the answer to a
prompt does not depend on what else is in the batch.

Depends on torch, transformers, head.py.   Try it:  python -m pytest tests/test_sampling.py -q
Shapes: B prompts, W their padded width, T new tokens, V vocabulary.
"""

import warnings
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput

from engine.head import agree

# transformers renamed the argument and the output in the middle of its version 5.
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
FINISHED = 0.1  # the largest share of finished rows that a decoding step may carry along
WHOLE_BATCH = WeakSet()  # models found to have a cache that rows cannot leave
NO_FLOAT64 = ("mps",)  # kinds of device without float64


class Draw(LogitsProcessor):
    """Choose the next token, and leave it as the only possible one. Padded vocabulary (Qwen2.5's table is larger than its
    tokenizer) is never chosen.

    noise (B, T) uniform in [0, 1), or None for the likeliest token; column t decides new token t. bar: of progress, one per token.

    The draw inverts the cumulative distribution: every token owns a stretch of [0, 1) as long as its probability, and the
    random number says whose stretch it fell into. Four tokens, and the number .55:

        probabilities       .1   .2   .3   .4
        summed up           .1   .3   .6   1.      .6 is the first sum above .55: the third token is drawn

    The number belongs to the row and the position. A generator asked at every step hands its numbers out in the order of
    asking: with one row less in the batch, every later row would get another's. Like this an answer is the same in any
    batch, after any interruption, on any number of processes, and in a run that was resumed.
    """

    def __init__(self, vocab: int, width: int, temperature: float, noise: Tensor | None, bar=None):
        self.vocab, self.width, self.temperature, self.noise, self.bar = vocab, width, temperature, noise, bar

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.bar is not None:
            self.bar.update()
        logits = scores[:, : self.vocab]
        if self.noise is None:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            # float64: near 1 sums in fp32 move in steps of 6e-8, more than many of 150,000 tokens own; rounding would decide.
            exact = (logits.cpu() if logits.device.type in NO_FLOAT64 else logits).double()
            summed = (exact / self.temperature).softmax(-1).cumsum(-1)  # (B, V)
            number = self.noise[:, input_ids.shape[1] - self.width, None].to(summed) * summed[:, -1:]
            # right: the first token whose sum is *above* the number, so a token of probability 0 is never drawn.
            chosen = torch.searchsorted(summed, number, right=True).clamp(max=self.vocab - 1).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


class ManyFinished(StoppingCriteria):
    """Interrupt the batch once more than a share of its rows have ended; `done` (B,) says which."""

    def __init__(self, eos: list[int], share: float):
        self.eos, self.share, self.done = eos, share, False

    def __call__(self, input_ids: Tensor, scores, **_) -> Tensor:
        last = input_ids[:, -1]
        self.done = self.done | torch.isin(last, torch.tensor(self.eos, device=last.device))
        return (self.done.float().mean() > self.share).expand(len(last))


def rows_can_leave(cache) -> bool:
    """Whether batch_select_indices takes out of this cache all that it holds of a row: keys and values, but not the state of
    a recurrent layer (Mamba, linear attention, short convolutions). A layer that holds both offers the method too.
    """
    layers = getattr(cache, "layers", [])
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def continue_rows(
    model: nn.Module, prompts: Tensor, mask: Tensor, config: GenerationConfig, draw: Draw
) -> tuple[list[Tensor], int]:
    """Left-padded prompts and their mask -> a row of new ids for each, and the number of token positions computed.

    prompts, mask (B, W); rows (up to T,) each.
    A model whose cache rows cannot leave writes the same answers with the whole batch going on to its longest one.
    """
    width, limit = prompts.shape[1], config.max_new_tokens
    share = 1.0 if model in WHOLE_BATCH else FINISHED
    rows: list[Tensor] = [prompts[0]] * len(prompts)
    ids, attended, alive = prompts, mask, torch.arange(len(prompts), device=prompts.device)
    cache, computed = None, 0
    while True:
        before = ids.shape[1]
        finished, config.max_new_tokens = ManyFinished(config.eos_token_id, share), limit - (before - width)
        noise = None if draw.noise is None else draw.noise[alive]
        out = model.generate(
            input_ids=ids,
            attention_mask=attended,
            generation_config=config,
            logits_processor=LogitsProcessorList([Draw(draw.vocab, width, draw.temperature, noise, draw.bar)]),
            stopping_criteria=StoppingCriteriaList([finished]),
            **({CACHE: cache} if cache is not None else {}),
        )
        config.max_new_tokens = limit
        ids, cache = out.sequences, getattr(out, CACHE, None)
        computed += len(alive) * (ids.shape[1] - before)
        gone = finished.done | (ids.shape[1] - width >= limit)
        for i, row in zip(alive[gone].tolist(), ids[gone], strict=True):
            rows[i] = row[width:]
        if gone.all():
            return rows, computed
        if not rows_can_leave(cache):  # found out at the first interruption; what is written again is the same
            WHOLE_BATCH.add(model)
            why = "rows cannot leave its cache, so every batch of answers goes on to its longest one"
            warnings.warn(f"{type(model).__name__}: {why}", stacklevel=2)
            return continue_rows(model, prompts, mask, config, draw)
        stay = (~gone).nonzero().squeeze(1)
        attended = torch.cat([attended, attended.new_ones(len(attended), ids.shape[1] - before)], 1)[stay]
        alive, ids = alive[stay], ids[stay]
        cache.batch_select_indices(stay)


@contextmanager
def answering(model: nn.Module, config: GenerationConfig):
    """Evaluation mode (no dropout, no gradient checkpointing, which would forbid the KV cache), and no hub defaults.

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


@torch.no_grad()
def check_company(model: nn.Module, prompt: list[int]) -> None:
    """Does a padded row, token by token through a cache, get the logits that it gets alone and at once? ValueError if not."""
    device, short, forced = model.get_input_embeddings().weight.device, prompt[len(prompt) // 2 :], prompt[0]
    pads = [0] * (len(prompt) - len(short))
    ids, mask = torch.tensor([[prompt, pads + short], [[1] * len(prompt), pads + [1] * len(short)]], device=device)
    settings = dict(pad_token_id=0, do_sample=False, use_cache=True, return_dict_in_generate=True, output_logits=True)
    config = GenerationConfig(max_new_tokens=3, **settings)
    force = lambda _, scores: torch.full_like(scores, -torch.inf).index_fill(1, ids[0, :1], 0.0)
    with answering(model, config):
        out = model.generate(ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([force]))
        theirs = model(input_ids=torch.tensor([short + [forced] * 2], device=device), use_cache=False).logits[0, -3:]
    agree(torch.stack(out.logits)[:, 1], theirs, "in a padded batch, token by token, it says something else of a prompt than alone")
