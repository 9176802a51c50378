"""LoRA: the base is the adapter switched off, the EMA teacher really moves, and both kinds of checkpoint load
elsewhere.
"""

import json

import pytest
import torch
from conftest import steps_of
from torch.testing import assert_close

import train
from ema import EMA
from engine.build import AdapterOff
from engine.config import make
from engine.loading import load

peft = pytest.importorskip("peft")
CPU = torch.device("cpu")
FAST = dict(batch=6, micro_batch=3, eval_size=1, train_size=20, teacher_every=0, max_new_tokens=16)
FAST |= dict(lora_rank=4, lora_alpha=8)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def adapted():
    lm = load("tiny", CPU)
    lm.add_lora(4, 8, 0.0)
    return lm


def move(lm, by=0.05):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in lm.model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn_like(p))


def test_only_the_factors_train_and_the_start_is_the_base():
    lm = adapted()
    assert all("lora_" in n for n, p in lm.model.named_parameters() if p.requires_grad)
    assert_close(logits(lm.model), logits(load("tiny", CPU).model))


def test_the_frozen_teacher_is_the_base_whatever_was_trained():
    lm = adapted()
    base = logits(load("tiny", CPU).model)
    move(lm)
    moved = logits(lm.model)
    assert (moved - base).abs().max() > 0.1
    with AdapterOff(lm.adapter).applied_to(lm.model) as teacher:
        assert_close(logits(teacher), base)
    assert_close(logits(lm.model), moved, rtol=0, atol=0)


def test_the_ema_teacher_moves_after_the_first_update_and_starts_at_the_current_weights():
    """The official sync skips exactly lora_A and lora_B, so its teacher's output never changes; another known
    implementation starts the averaged factors at zero, so that the teacher begins as a fraction of the student it
    should equal."""
    lm = adapted()
    move(lm)
    ema = EMA(lm.model, 0.9)
    with ema.applied_to(lm.model) as teacher:
        start = logits(teacher)
    assert_close(start, logits(lm.model), rtol=0, atol=0)
    move(lm, 0.2)
    ema.update(lm.model)
    with ema.applied_to(lm.model) as teacher:
        after = logits(teacher)
    assert (after - start).abs().max() > 1e-3
    assert (after - logits(lm.model)).abs().max() > 1e-3


SLOW = [pytest.param(recipe, marks=pytest.mark.slow) for recipe in ("sd", "ssd")]


@pytest.mark.parametrize("recipe", ["unisd-star", *SLOW])
def test_a_run_and_its_checkpoint_in_plain_peft(recipe, tmp_path, no_picture):
    from transformers import AutoModelForCausalLM

    train.main(make(recipe, out=str(tmp_path), steps=3, lora_dropout=0.05, **FAST))
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    base = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    again = load(str(tmp_path), CPU)
    assert_close(logits(plain), logits(again.model))
    assert (logits(plain) - logits(load("tiny", CPU).model)).abs().max() > 1e-4


def test_resume_is_exact_with_factors_and_dropout(tmp_path):
    cfg = FAST | dict(steps=3, lora_dropout=0.1, ema_every=1)
    straight, rows = steps_of(tmp_path / "a", **cfg)
    steps_of(tmp_path / "b", last=2, **cfg)
    resumed, rows_again = steps_of(tmp_path / "b", resume=True, **cfg)
    a, b = straight.lm.model.state_dict(), resumed.lm.model.state_dict()
    assert rows == rows_again and all((a[n] == b[n]).all() for n in a)


def test_the_micro_batch_still_does_not_matter_and_checkpointing_neither(tmp_path):
    runs = [({}, "a"), (dict(micro_batch=2), "b"), (dict(grad_checkpointing=True), "c")]
    a, b, c = (steps_of(tmp_path / x, steps=1, **(FAST | more))[0].lm.model.state_dict() for more, x in runs)
    for n in a:
        assert_close(a[n], b[n], rtol=1e-3, atol=2e-4)
        assert_close(a[n], c[n], rtol=1e-3, atol=2e-4)


def test_training_goes_on_from_a_loaded_adapter(tmp_path):
    """Its factors become part of the weights: what is trained next starts from there, never from the bare base."""
    steps_of(tmp_path / "a", "sft", last=3, steps=3, lr=1e-2, **FAST)
    saved = str(tmp_path / "a" / "checkpoint-3")
    first = load(saved, CPU)
    run = train.start(make("sd", model=saved, preset="tiny", out=str(tmp_path), steps=1, **FAST), tmp_path)
    assert_close(logits(run.lm.model), logits(first.model), rtol=1e-4, atol=1e-4)
    with run.teacher() as teacher:
        assert_close(logits(teacher), logits(first.model), rtol=1e-4, atol=1e-4)


def test_a_bf16_base_with_fp32_factors(tmp_path):
    run, _ = steps_of(tmp_path, last=1, steps=1, dtype="bf16", **FAST)
    assert {p.dtype for n, p in run.lm.model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    again = load(str(tmp_path / "checkpoint-1"), CPU)
    assert all(p.dtype == torch.float32 for n, p in again.model.named_parameters() if "lora_" in n)
