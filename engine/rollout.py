"""rollout.py - a model answers: sample from it, and know where an answer ends.

On-policy completions y ~ p_student(. | x): a model that learns from its own answers needs answers that are really its own.
How a batch is continued and a token drawn is in sampling.py; here is what is easy to get wrong around it:
  - the completion mask is 1 up to and *including* the first end-of-text token, whatever the pad token is. `ids != pad`
  would unlearn stopping for every model whose pad token is its end token.
  - *every* end-of-text id counts, those of the generation config included (Gemma ends a turn with an id its tokenizer
  does not call eos).
  - a hub model's own sampling defaults (top-p, repetition penalty) are switched off: they would make the samples
  off-policy.

Depends on torch, transformers, loading.py, sampling.py, data.py.   Try it:  python -m pytest tests/test_rollout.py -q
Shapes: B prompts, T new tokens.
"""

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from engine.loading import Loaded
from engine.sampling import Draw, answering, continue_rows
from tasks.data import MARK, plain_ids, render


def completion_mask(ids: Tensor, eos: list[int]) -> Tensor:
    """1 up to and including the first end-of-text id, 0 after it. (B, T) -> (B, T). The pad id plays no part."""
    is_eos = torch.isin(ids, torch.tensor(eos, device=ids.device, dtype=ids.dtype))
    return (is_eos.long().cumsum(1) - is_eos.long() == 0).long()  # was an end seen strictly *before* this position?


def left_pad(prompts: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths -> ids and mask, (B, longest) each. Padded on the left: what comes next is one column."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def right_pad(rows: list[list[int]], device, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Texts of any lengths -> ids and mask, (B, longest) each. Padded on the right, where a causal model does not look."""
    width = max(map(len, rows))
    ids = torch.tensor([r + [fill] * (width - len(r)) for r in rows], device=device)
    return ids, torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)


def generate(
    lm: Loaded, prompts: list[list[int]], max_new_tokens: int, temperature: float, noise: Tensor | None = None, tally=None
) -> tuple[Tensor, Tensor]:
    """Sample (temperature > 0) or decode greedily (0). -> ids, mask (B, T), T the longest answer, pad ids after an end.

    noise (B, max_new_tokens), uniform in [0, 1): the randomness; None takes it from torch's generator. With the same
    noise a prompt gets the same answer in whatever company. Rows are answered in batches of similar prompt length; the
    order of the results is that of `prompts`. tally, if given, counts "written" tokens and "decoded" positions: what
    the second has more went into rows that had already ended.
    Raises ValueError if a prompt and its answer do not fit the model's context.
    """
    longest = max(map(len, prompts))
    if longest + max_new_tokens > lm.context:
        both = f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the model's context of {lm.context}"
        raise ValueError(f"{both}: lower --max-new-tokens or --max-prompt-tokens, or shorten the question")
    if temperature > 0 and noise is None:
        noise = torch.rand(len(prompts), max_new_tokens)
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.eos[0]
    # Not do_sample: the token is drawn in sampling.Draw.
    settings = dict(eos_token_id=lm.eos, pad_token_id=pad, do_sample=False, return_dict_in_generate=True)
    config = GenerationConfig(max_new_tokens=max_new_tokens, use_cache=True, **settings)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rows: dict[int, Tensor] = {}
    decoded = 0
    steps = -(-len(order) // lm.sample_batch) * max_new_tokens
    look = dict(desc=f"answers of up to {max_new_tokens} tokens", unit="token", leave=False, delay=10, disable=bool(lm.ranks.rank))
    with torch.no_grad(), lm.autocast(), answering(lm.model, config), tqdm(total=steps, **look) as bar:
        for start in range(0, len(order), lm.sample_batch):
            batch = order[start : start + lm.sample_batch]
            ids, mask = left_pad([prompts[i] for i in batch], lm.device)
            batch_noise = noise[batch].to(lm.device) if temperature > 0 else None
            draw = Draw(lm.vocab, ids.shape[1], temperature, batch_noise, bar)
            answers, computed = continue_rows(lm.model, ids, mask, config, draw)
            bar.update((start // lm.sample_batch + 1) * max_new_tokens - bar.n)
            rows.update(zip(batch, answers, strict=True))
            decoded += computed
    ids, generated = right_pad([rows[i].tolist() for i in range(len(prompts))], lm.device, fill=pad)
    mask = completion_mask(ids, lm.eos) * generated  # padding may look like an end, and an answer that was cut has none
    if tally is not None:
        tally["written"] = tally.get("written", 0) + int(mask.sum())
        tally["decoded"] = tally.get("decoded", 0) + decoded
    width = int(mask.sum(1).max())
    return ids[:, :width], mask[:, :width]


def decode(lm: Loaded, ids: Tensor, mask: Tensor) -> list[str]:
    """The text of each completion, without end-of-text and padding."""
    written = [row[m.bool()] for row, m in zip(ids, mask, strict=True)]
    return [lm.tokenizer.decode(row, skip_special_tokens=True).strip() for row in written]


def turn_end(lm: Loaded) -> int:
    """The id that the chat template itself puts after an assistant's answer: the end that a reference is trained with."""
    for more in ((), ("x",)):  # GLM-4 ends a turn with the header of the next one
        after = render(lm.tokenizer, "x", MARK, *more).partition(MARK)[2]
        for i in plain_ids(lm.tokenizer, after):
            if i in lm.eos:
                return i  # the first: Phi-3 ends a turn with <|end|>, and the whole text with <|endoftext|>
    return lm.eos[0]
