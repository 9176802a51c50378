"""The slow teacher: direction, precision, what it averages, and that it gives the student back untouched."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ema import EMA, half_life


def model_of(value, dtype=torch.float32, n=4):
    model = nn.Linear(n, n, bias=False).to(dtype)
    nn.init.constant_(model.weight, value)
    return model


def test_one_step_in_the_right_direction():
    model = model_of(0.0)
    ema = EMA(model, decay=0.9)
    nn.init.constant_(model.weight, 1.0)
    ema.update(model)  # .9 * 0 + .1 * 1: the *old* teacher keeps 90 %
    assert_close(ema.shadow["weight"], torch.full((4, 4), 0.1))


def test_it_moves_in_a_bf16_model_where_a_bf16_average_cannot():
    model = model_of(1.0, torch.bfloat16)
    ema = EMA(model, decay=0.99)
    naive = model.weight.detach().clone()
    nn.init.constant_(model.weight, 1.0078125)  # one bf16 step above 1
    for _ in range(100):
        ema.update(model)
        naive.mul_(0.99).add_(model.weight.detach(), alpha=0.01)
    assert ema.shadow["weight"].dtype == torch.float32
    assert_close(ema.shadow["weight"].mean().item(), 1 + 0.0078125 * (1 - 0.99**100), rtol=1e-5, atol=0)
    assert (naive <= 1.0).all()  # rounding swallowed every update
    before = ema.shadow["weight"].clone()
    ema.update(model)
    assert (ema.shadow["weight"] > before).all()


def test_only_what_is_trained_is_averaged_and_nothing_is_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert set(EMA(model, 0.9).shadow) == {"1.weight", "1.bias"}
    with pytest.raises(ValueError, match="nothing is trainable"):
        EMA(model.requires_grad_(False), 0.9)
    with pytest.raises(ValueError, match="decay"):
        EMA(model_of(1.0), 1.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_applied_to_is_the_teacher_inside_and_the_student_outside(dtype):
    model = model_of(0.0, dtype)
    ema = EMA(model, 0.5)
    nn.init.constant_(model.weight, 1.0)
    ema.update(model)
    address, x = model.weight.data_ptr(), torch.ones(1, 4, dtype=dtype)
    with ema.applied_to(model) as teacher:
        assert_close(teacher(x).detach(), torch.full((1, 4), 2.0, dtype=dtype))
    assert_close(model(x).detach(), torch.full((1, 4), 4.0, dtype=dtype))
    assert model.weight.data_ptr() == address
    with pytest.raises(RuntimeError, match="inside"), ema.applied_to(model):
        raise RuntimeError("inside")
    assert (model.weight == 1).all()


def test_decay_one_is_a_frozen_copy():
    model = model_of(2.0)
    ema = EMA(model, 1.0)
    nn.init.constant_(model.weight, 5.0)
    ema.update(model)
    assert (ema.shadow["weight"] == 2).all()


def test_state_goes_round_and_another_models_is_refused():
    model = model_of(0.0)
    ema = EMA(model, 0.9)
    nn.init.constant_(model.weight, 1.0)
    ema.update(model)
    other = EMA(model_of(7.0), 0.1)
    other.load_state_dict(ema.state_dict())
    assert (other.decay, other.updates) == (0.9, 1)
    assert_close(other.shadow["weight"], ema.shadow["weight"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="another model"):
        EMA(model_of(0.0, n=3), 0.9).load_state_dict(ema.state_dict())


def test_tied_weights_are_averaged_once():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    assert len(EMA(model, 0.9).shadow) == 1


def test_half_life():
    assert half_life(0.9, 10) == pytest.approx(65.79, abs=0.01)  # ten steps an update, ln(.5) / ln(.9) = 6.58 updates
    assert half_life(0.5) == 1.0 and half_life(1.0) == math.inf and half_life(0.0) == 0.0
    model, ema = model_of(0.0), None
    ema = EMA(model, 0.9)
    nn.init.constant_(model.weight, 1.0)
    for _ in range(7):
        ema.update(model)
    assert 0.5 < ema.shadow["weight"][0, 0] < 0.53  # half of it new after 6.58 updates
