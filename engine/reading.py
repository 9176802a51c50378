"""reading.py - all readings of a step in as few forward passes as a token budget allows.

With contexts for all answers UniSD* reads each under five prompts: reference, wrong one, K = 3 contexts. One after the other,
each padded to its longest row, a quarter of the work is padding. Here the rows of *all* readings are sorted by length and cut into
passes of at most `budget` tokens. The result equals `unisd.read_plainly`, to 1e-12 in float64; this file exists because
scoring is then 60 % of a step's time, and 41 % by default (docs/cost.md).

Depends on torch, unisd.py, head.py.   Try it:  python -m pytest tests/test_unisd.py -q
Shapes: B sequences, T completion tokens, V vocabulary, H hidden size, N = unmasked tokens of all sequences, end to end.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from engine.head import Head, sampled_logps
from unisd import Batch, Reading, read


def passes(lengths: list[int], budget: int) -> list[list[int]]:
    """Row numbers, shortest first, in groups of at most `budget` tokens counting padding. A group has at least one row.

    passes([7, 3, 9, 1], 14) = [[3, 1], [0], [2]]: the rows of 1 and 3 tokens make 2 x 3 = 6, with the next 3 x 7 = 21.
    """
    groups, order = [], sorted(range(len(lengths)), key=lengths.__getitem__)
    for row in order:
        if not groups or (len(groups[-1]) + 1) * lengths[row] > budget:
            groups.append([])
        groups[-1].append(row)
    return groups


@dataclass
class PackedReader:
    """`reader(list of Reading) -> {name: Tensor}`: (N, H) where states are kept, (B, T) where log-probs are, 0 where not read.

    head: the head of whoever the model is while this reader reads. tally counts "read" tokens and, with padding, "padded" ones.
    """

    model: nn.Module
    head: Head
    batch: Batch
    budget: int
    chunk: int = 0
    tally: dict | None = None

    @torch.no_grad()
    def __call__(self, readings: list[Reading]) -> dict[str, Tensor]:
        ids, mask = self.batch.ids, self.batch.mask.bool()
        counts, everyone = mask.sum(1).tolist(), range(len(mask))
        # Of readings of the same rows under the same prompts only the first is made: --contexts-include-teacher has such a one.
        which = [(reading.prompts, everyone if reading.rows is None else reading.rows) for reading in readings]
        first = [which.index(prompts_and_rows) for prompts_and_rows in which]
        rows = [(k, b) for k in dict.fromkeys(first) for b in which[k][1]]
        lengths = [len(readings[k].prompts[b]) + counts[b] for k, b in rows]
        kept: dict[str, Tensor] = {}
        for group in passes(lengths, self.budget):
            chosen = sorted(rows[i] for i in group)  # the rows of one reading side by side
            sequences = [b for _, b in chosen]
            states = read(self.model, [readings[k].prompts[b] for k, b in chosen], ids[sequences], mask[sequences])
            start = 0
            for k, pairs in groupby(chosen, key=lambda row: row[0]):  # the rows of one reading
                own = [b for _, b in pairs]
                stop = start + sum(counts[b] for b in own)
                for same in (reading for reading, j in zip(readings, first, strict=True) if j == k):
                    self._keep(same, states[start:stop], own, kept)
                start = stop
            if self.tally is not None:
                self.tally["read"] = self.tally.get("read", 0) + sum(lengths[i] for i in group)
                self.tally["padded"] = self.tally.get("padded", 0) + max(lengths[i] for i in group) * len(group)
        wide = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        nothing = torch.zeros(mask.shape, dtype=wide, device=ids.device)  # of a reading without rows
        return {reading.name: kept.get(reading.name, nothing) for reading in readings}

    def _keep(self, reading: Reading, states: Tensor, sequences: list[int], kept: dict[str, Tensor]) -> None:
        """Put what is wanted of some sequences' states (n, H) where it belongs in the whole."""
        mask = self.batch.mask.bool()
        place = torch.zeros_like(mask)
        place[sequences] = mask[sequences]  # `sequences` ascend, so the flat order of `place` is the order of the states
        if reading.temperature is None:
            found, place, shape = states, place[mask], (int(mask.sum()), states.shape[-1])
        else:
            ids = self.batch.ids[sequences][mask[sequences]]
            found, shape = sampled_logps(states, ids, self.head, reading.temperature, self.chunk), mask.shape
        if reading.name not in kept:
            kept[reading.name] = found.new_zeros(shape)
        kept[reading.name][place] = found


def token_slices(mask: Tensor, size: int) -> Iterable[tuple[slice, slice]]:
    """A step cut into micro-batches of `size` sequences. -> (which of the B rows, which of the N tokens), one after the other."""
    ends = [0, *mask.sum(1).cumsum(0).tolist()]
    for start in range(0, len(mask), size):
        stop = min(start + size, len(mask))
        yield slice(start, stop), slice(ends[start], ends[stop])
