"""ema.py - a slow copy of what is being trained.

With --teacher ema (the recipes ema and unisd-star) the teacher's weights are a running average of the student's. A frozen teacher
never improves, and the student itself as teacher repeats its latest accident; an average follows slowly, and the noise of
single steps cancels in it.
UniSD (arXiv 2605.06597), eq. 3, every S optimizer steps:

    shadow <- decay * shadow + (1 - decay) * student            decay = the share of the OLD teacher that stays

Depends on torch only.   Try it:  python ema.py
"""

import math
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """Exponential moving average of a model's trainable parameters: `shadow`, {name: tensor}, in fp32 or float64.

    decay: share of the old average kept at each update, 0 <= decay <= 1; 1 is a frozen copy of the weights as they are
    now. Raises ValueError for a decay outside [0, 1] or a model with nothing to train.
    Under LoRA it averages the factors A and B, not their product: at decay .9, A: 1 -> 3 and B: 0 -> 2 give 1.2 * .2 =
    .24, where an average of the products 0 and 6 would be .6.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"ema decay must lie in [0, 1], got {decay}")
        self.decay, self.updates = decay, 0
        # It starts at the present weights: started at zero, it would be at 65 % of them after ten updates of .9.
        self.shadow = {name: self._wide(p).clone() for name, p in model.named_parameters() if p.requires_grad}
        if not self.shadow:
            raise ValueError("nothing is trainable: an average of nothing never moves (is every parameter frozen?)")

    @staticmethod
    def _wide(parameter: torch.Tensor) -> torch.Tensor:
        """In fp32 at least, because an average moves in steps that bf16 cannot hold.

        bf16 has 8 significant bits: the next number after 1 is 1 + 1/128 = 1.0078, and what is less than half way there
        is rounded back to 1. At decay .99 a student at 1.3 moves the average from 1 to 1.003: it is 1 again, now and at
        every later update. It would not move before the student is past 1.39.
        """
        return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step of eq. 3. Call it after the optimizer step, every S of them."""
        for name, parameter in self._tracked(model):
            # a.lerp_(b, t) is a + t (b - a): with t = 1 - decay that is eq. 3, in place and without a temporary.
            self.shadow[name].lerp_(self._wide(parameter), 1.0 - self.decay)
        self.updates += 1

    @contextmanager
    def applied_to(self, model: nn.Module):
        """`with ema.applied_to(model):` the model *is* the teacher, and the student again afterwards, bit for bit, also
        after an exception.

        The shadow lends, the model borrows: for a while each parameter points at the shadow's own memory (in a bf16
        model, at a rounded copy of it). The student's tensors are put aside untouched, and put back at the end.
        """
        # So only read inside. Two traps:
        # 1. Never train inside: an optimizer step would write into the shadow.
        # 2. Never divide a forward and its backward pass between inside and outside. y = w x (w the scale of a norm)
        #    keeps w for the backward pass, and autograd does not notice that w.data points elsewhere by then: forward
        #    outside at w = 2, backward inside, where w is 5, and dy/dx is 5 instead of 2. Nothing warns.
        put_aside = {}
        try:
            for name, parameter in self._tracked(model):
                put_aside[name] = parameter.detach().clone() if _is_sharded(parameter) else parameter.data
                self._point(parameter, self.shadow[name])
            torch.clear_autocast_cache()  # autocast keeps bf16 copies by parameter: they are still the student's
            yield model
        finally:
            for name, parameter in self._tracked(model):
                if name in put_aside:  # not if the exception came before its turn
                    self._point(parameter, put_aside[name])
            torch.clear_autocast_cache()

    @staticmethod
    @torch.no_grad()
    def _point(parameter: nn.Parameter, values: torch.Tensor) -> None:
        if _is_sharded(parameter):
            parameter.copy_(values)  # FSDP owns the memory: there the values change places, not the tensors
        else:
            parameter.data = values.to(parameter.dtype)  # .to() copies only if the type differs

    def _tracked(self, model: nn.Module):
        return ((name, parameter) for name, parameter in model.named_parameters() if name in self.shadow)

    def state_dict(self) -> dict:
        """Everything a checkpoint needs; tensors are the live ones, not copies."""
        return {"decay": self.decay, "updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        """Copy a saved average in place. Raises ValueError if names or shapes differ from this model's."""
        saved, present = ({n: tuple(t.shape) for n, t in shadow.items()} for shadow in (state["shadow"], self.shadow))
        if saved != present:
            differ = sorted(name for name in saved.keys() | present.keys() if saved.get(name) != present.get(name))
            raise ValueError(f"the saved average belongs to another model: {len(differ)} parameters differ, first {differ[0]}")
        self.decay, self.updates = state["decay"], state["updates"]
        for name, values in state["shadow"].items():
            self.shadow[name].copy_(values)


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "to_local")  # a DTensor: what FSDP2 makes of a parameter


def half_life(decay: float, every: int = 1) -> float:
    """Optimizer steps until half of the teacher is new; inf at decay 1, 0 at decay 0.

    After n updates decay^n of the old teacher is left; decay^n = 1/2 gives n = ln(1/2) / ln(decay), times `every`.
    decay .9 every 10 steps -> 65.8 steps; .98 every 10 -> 343.
    """
    if decay >= 1.0:
        return math.inf
    return 0.0 if decay <= 0.0 else every * math.log(0.5) / math.log(decay)


if __name__ == "__main__":  # a hand-sized example for a pocket calculator; docs/by-hand.md shows its output
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema, bf16, averages = EMA(model, decay=0.9), torch.ones(1, dtype=torch.bfloat16), [(1.0, 1.0)]
    model.weight.data.fill_(1.02)
    for _ in range(1000):
        ema.update(model)
        bf16 = (0.9 * bf16.float() + 0.1 * 1.02).bfloat16()  # the sum in fp32, the result kept in bf16
        averages.append((ema.shadow["weight"].item(), bf16.item()))
    shown = [*range(11), 1000]
    print("The student's weight jumps from 1 to 1.02. After n updates its average is 1.02 - 0.02 * 0.9^n:\n")
    print("n   " + "".join(f"{n:8}" for n in shown))
    for i, name in enumerate(["fp32", "bf16"]):
        print(name + "".join(f"{averages[n][i]:8.4f}" for n in shown))
    print("Notice: bf16 is stuck. Its next number after 1 is 1.0078; 1 + 0.1 * 0.02 = 1.002 is rounded back to 1.\n")

    print("Half-life = every * ln(1/2) / ln(decay), in optimizer steps:")
    for decay, every in [(0.9, 1), (0.9, 10), (0.98, 10)]:
        print(f"decay {decay:.2f} every {every:2} steps{half_life(decay, every):8.1f}")
    print("Notice: 6.6 updates at 0.9; the fp32 row above passes 1.0100, half way, between n = 6 and n = 7.\n")

    model.weight.data.fill_(1.05)
    with ema.applied_to(model):
        inside, lent = model.weight.item(), model.weight.data_ptr() == ema.shadow["weight"].data_ptr()
    print("The student moves on to 1.05. The model's weight inside `with ema.applied_to(model)`, and after it:")
    print(f"{inside:.4f}  {model.weight.item():.4f}")
    print(f"Notice: inside, the model borrows the shadow's memory ({lent}); after it, the student's own is back.")
