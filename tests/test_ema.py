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


def test_where_the_memory_is_not_ours_the_values_change_places(monkeypatch):
    """A sharded parameter's memory belongs to FSDP: it is written into, so the student's values must have been copied before."""
    monkeypatch.setattr("ema._is_sharded", lambda parameter: True)
    model = model_of(0.0)
    ema = EMA(model, decay=0.0)
    nn.init.constant_(model.weight, 1.0)
    ema.update(model)
    nn.init.constant_(model.weight, 2.0)
    address = model.weight.data_ptr()
    with ema.applied_to(model):
        assert (model.weight == 1).all() and model.weight.data_ptr() == address
    assert (model.weight == 2).all() and (ema.shadow["weight"] == 1).all()


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
    larger = EMA(nn.Linear(2, 2), 0.9)
    with pytest.raises(ValueError, match="2 parameters differ, first bias"):  # a name that only one of them has, on either side
        larger.load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match="2 parameters differ, first bias"):
        EMA(model_of(0.0), 0.9).load_state_dict(larger.state_dict())


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


# --- the worked numbers of the comments ------------------------------------------------------------------------------


def test_where_a_bf16_average_of_99_per_cent_begins_to_move():
    moved = lambda student: (0.99 * 1.0 + 0.01 * torch.tensor(student)).bfloat16().item() > 1
    assert not moved(1.3) and not moved(1.39) and moved(1.3908)
    assert torch.tensor(1 + 1 / 128).bfloat16().item() == 1.0078125  # the next number after 1


def test_an_average_that_starts_at_zero_is_no_model():
    ema = EMA(model_of(0.0), 0.9)
    for _ in range(10):
        ema.update(model_of(1.0))
    assert ema.shadow["weight"][0, 0].item() == pytest.approx(0.65, abs=0.005)


def test_under_lora_the_factors_are_averaged_not_their_product():
    factors = nn.ParameterDict({"A": torch.ones(1), "B": torch.zeros(1)})
    ema = EMA(factors, 0.9)
    factors["A"].data.fill_(3.0), factors["B"].data.fill_(2.0)
    ema.update(factors)
    assert (ema.shadow["A"] * ema.shadow["B"]).item() == pytest.approx(0.24) != pytest.approx(0.1 * 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shadow_lends_its_own_memory_or_a_rounded_copy(dtype):
    model = model_of(1.0, dtype)
    ema, own = EMA(model, 0.9), model.weight.data_ptr()
    with ema.applied_to(model):
        assert (model.weight.data_ptr() == ema.shadow["weight"].data_ptr()) == (dtype == torch.float32)
        model.weight.data.fill_(7.0)  # what an optimizer step does: the first trap
    assert (ema.shadow["weight"] == 7).all() == (dtype == torch.float32)
    assert model.weight.data_ptr() == own and (model.weight == 1).all()


def test_a_backward_pass_inside_goes_through_the_wrong_weights():
    """The second trap, and why it is one: nothing warns. (A linear layer keeps a view of its weights, and escapes.)"""
    model, x = nn.ParameterDict({"w": torch.tensor(5.0)}), torch.tensor(1.0, requires_grad=True)
    ema = EMA(model, 1.0)
    nn.init.constant_(model["w"], 2.0)
    y = model["w"] * x
    with ema.applied_to(model):
        y.backward()
    assert x.grad.item() == 5.0


def test_autocast_does_not_go_on_with_the_students_weights():
    model, x = model_of(1.0, n=1), torch.ones(1, 1)
    ema = EMA(model, 1.0)
    nn.init.constant_(model.weight, 2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).item() == 2.0
        with ema.applied_to(model):
            assert model(x).item() == 1.0
        assert model(x).item() == 2.0
