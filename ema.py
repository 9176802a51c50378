"""ema.py - a slow copy of what is being trained.

What: the teacher's weights are a running average of the student's. UniSD (arXiv 2605.06597), eq. 3, every S optimizer
steps:

    shadow <- decay * shadow + (1 - decay) * student            decay = the share of the OLD teacher that stays

Not like the official code: 1) there the average skips the LoRA factors, that is, everything that is trained, so the
teacher never moves; here it runs over whatever has requires_grad, and refuses to average nothing. 2) it is kept in
fp32: in bf16, an update smaller than half a unit in the last place is rounded away, and at decay 0.99 a teacher stays
where it is until the student has moved by a fifth of the weight or more. 3) it is saved and restored with the
checkpoint. The shadow starts at the current weights, never at zero. Under LoRA it averages the factors A and B, which
is not the average of their product BA.

Depends on torch only.   Try it:  python -m pytest tests/test_ema.py -q
"""

import math
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """Exponential moving average of a model's trainable parameters, in fp32 (float64 parameters stay float64).

    decay: share of the old average kept at each update, 0 <= decay <= 1; 1 is a frozen copy of the weights as they are
    now. Raises ValueError for a decay outside [0, 1] or a model with nothing to train.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"ema decay must lie in [0, 1], got {decay}")
        self.decay, self.updates = decay, 0
        self.shadow = {n: self._wide(p).clone() for n, p in model.named_parameters() if p.requires_grad}
        if not self.shadow:
            raise ValueError("nothing is trainable: an average of nothing never moves (is every parameter frozen?)")

    @staticmethod
    def _wide(p: torch.Tensor) -> torch.Tensor:
        return p.detach().to(torch.promote_types(p.dtype, torch.float32))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step of eq. 3. Call it after the optimizer step, every S of them."""
        for n, p in self._tracked(model):
            self.shadow[n].lerp_(self._wide(p), 1.0 - self.decay)
        self.updates += 1

    @contextmanager
    def applied_to(self, model: nn.Module):
        """`with ema.applied_to(model):` the model *is* the teacher, and the student again afterwards, bit for bit, also
        after an exception.

        Nothing is copied in fp32: parameters only borrow the shadow's memory. So: read inside, never train inside, and
        leave before the student's forward pass - a live autograd graph would be walked back through the wrong weights.
        A sharded parameter (FSDP) cannot borrow, because its owner keeps the memory: there the values change places.
        """
        mine = {}
        try:
            for n, p in self._tracked(model):
                mine[n] = p.detach().clone() if hasattr(p, "to_local") else p.data
                self._put(p, self.shadow[n])
            torch.clear_autocast_cache()  # it remembers bf16 casts by parameter, not by what the parameter holds
            yield model
        finally:
            for n, p in self._tracked(model):
                if n in mine:
                    self._put(p, mine[n])
            torch.clear_autocast_cache()

    @staticmethod
    @torch.no_grad()
    def _put(p: nn.Parameter, values: torch.Tensor) -> None:
        if hasattr(p, "to_local"):
            p.copy_(values)
        else:
            p.data = values.to(p.dtype)

    def _tracked(self, model: nn.Module):
        return ((n, p) for n, p in model.named_parameters() if n in self.shadow)

    def state_dict(self) -> dict:
        """Everything a checkpoint needs; tensors are the live ones, not copies."""
        return {"decay": self.decay, "updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        """Copy a saved average in place. Raises ValueError if names or shapes differ from this model's."""
        saved = {n: tuple(t.shape) for n, t in state["shadow"].items()}
        ours = {n: tuple(t.shape) for n, t in self.shadow.items()}
        if saved != ours:
            odd = sorted(n for n in saved.keys() | ours.keys() if saved.get(n) != ours.get(n))
            raise ValueError(
                f"the saved average belongs to another model: {len(odd)} parameters differ, first {odd[0]}"
            )
        self.decay, self.updates = state["decay"], state["updates"]
        for n, t in state["shadow"].items():
            self.shadow[n].copy_(t)


def half_life(decay: float, every: int = 1) -> float:
    """Optimizer steps until half of the teacher is new: every * ln(1/2) / ln(decay). decay .9 every 10 -> 65.8; .98 ->
    343. inf at 1, 0 at 0.
    """
    if decay >= 1.0:
        return math.inf
    return 0.0 if decay <= 0.0 else every * math.log(0.5) / math.log(decay)
