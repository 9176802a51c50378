"""LoRA: the base is the adapter switched off, the EMA teacher really moves, and both kinds of checkpoint load
elsewhere.
"""

import json
import shutil
import sys
import warnings

import pytest
import torch
import transformers
from conftest import steps_of
from torch.testing import assert_close

import train
from ema import EMA
from engine import plan
from engine.build import AdapterOff
from engine.config import make
from engine.loading import Loaded, load
from engine.pretrained import TINY

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


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["unisd-star", "sd"])
def test_a_run_and_its_checkpoint_in_plain_peft(recipe, tmp_path, no_picture):
    from transformers import AutoModelForCausalLM

    train.main(make(recipe, out=str(tmp_path), steps=3, lora_dropout=0.05, **FAST))
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    base = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    again = load(str(tmp_path), CPU)
    assert_close(logits(plain), logits(again.model))
    assert (logits(plain) - logits(load("tiny", CPU).model)).abs().max() > 1e-4


@pytest.mark.slow
def test_resume_is_exact_with_factors_and_dropout(tmp_path):
    cfg = FAST | dict(steps=3, lora_dropout=0.1, ema_every=1)
    straight, rows = steps_of(tmp_path / "a", **cfg)
    steps_of(tmp_path / "b", last=2, **cfg)
    resumed, rows_again = steps_of(tmp_path / "b", resume=True, **cfg)
    a, b = straight.lm.model.state_dict(), resumed.lm.model.state_dict()
    assert rows == rows_again and all((a[n] == b[n]).all() for n in a)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_bf16_base_with_fp32_factors(tmp_path):
    run, _ = steps_of(tmp_path, last=1, steps=1, dtype="bf16", **FAST)
    assert {p.dtype for n, p in run.lm.model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    again = load(str(tmp_path / "checkpoint-1"), CPU)
    assert all(p.dtype == torch.float32 for n, p in again.model.named_parameters() if "lora_" in n)


SMALL = dict(vocab_size=776, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0)
SMALL |= dict(num_key_value_heads=1, eos_token_id=2, bos_token_id=None)


@pytest.mark.parametrize(
    ("kind", "more", "names"),
    [
        ("Phi3", {}, "qkv_proj o_proj gate_up_proj down_proj"),
        ("Glm4", dict(head_dim=16), "q_proj k_proj v_proj o_proj gate_up_proj down_proj"),
        ("Starcoder2", {}, "q_proj k_proj v_proj o_proj c_fc c_proj"),
        ("GPTNeoX", {}, "query_key_value dense dense_h_to_4h dense_4h_to_h"),
        ("GPT2", dict(n_embd=32, n_layer=2, n_head=2), "c_attn c_proj c_fc"),
    ],
)
def test_every_linear_layer_is_adapted_whatever_its_name(kind, more, names, tiny):
    small = {k: v for k, v in SMALL.items() if kind != "GPT2" or k.endswith("id")} | {"vocab_size": 776}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind + "Config")(**small, **more))
    lm = Loaded(model, tiny.tokenizer, [2], tiny.vocab, kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "--lora-rank")
        lm.add_lora(2, 4, 0.0)
    trained = {n.split(".lora_")[0] for n, p in lm.model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-1] for n in trained} == set(names.split())
    left = [n for n, p in model.get_decoder().named_parameters() if p.dim() > 1 and "lora_" not in n and "base_layer" not in n]
    assert all("emb" in n or n in ("wte.weight", "wpe.weight") for n in left) and len(trained) % 2 == 0


def test_what_lora_leaves_out_is_named(tiny):
    """The experts of a mixture are one tensor each, and no linear layers."""
    config = transformers.Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    lm = Loaded(transformers.AutoModelForCausalLM.from_config(config), tiny.tokenizer, [2], tiny.vocab, "moe")
    with pytest.warns(UserWarning, match=r"--lora-rank leaves .*layers\.\*\.mlp\.experts\.gate_up_proj"):
        lm.add_lora(2, 4, 0.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the tiny model, base, and one with an adapter of it, runs/a, that was trained one folder above."""
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(TINY, folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lm = load("base", CPU)
        lm.add_lora(4, 8, 0.0)
        move(lm)
        lm.save("runs/a")
    return folder


def changed(saved, folder, **settings):
    """A copy of the saved adapter with other settings in its adapter_config.json."""
    shutil.copytree(saved / "runs/a", folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return str(folder)


def test_an_adapter_names_its_base_by_a_whole_path(saved, monkeypatch):
    monkeypatch.chdir("/")
    assert json.loads((saved / "runs/a/adapter_config.json").read_text())["base_model_name_or_path"] == str(saved / "base")
    assert (logits(load(str(saved / "runs/a"), CPU).model) - logits(load("tiny", CPU).model)).abs().max() > 0.1


@pytest.mark.parametrize("place", [".", "elsewhere"])
def test_a_relative_base_is_found_from_here_and_from_the_run(place, saved, monkeypatch, tmp_path):
    folder = changed(saved, saved / f"runs/relative-{place.strip('.')}", base_model_name_or_path="base")
    monkeypatch.chdir(saved if place == "." else tmp_path)
    assert_close(logits(load(folder, CPU).model), logits(load(str(saved / "runs/a"), CPU).model))
    assert plan.size_of(folder) == plan.size_of("tiny")  # --dry-run finds it, too


def test_a_missing_base_is_told_as_such(saved, tmp_path, capsys):
    """It was "has not finished", and from --resume "is finished"."""
    folder = changed(saved, tmp_path / "m", base_model_name_or_path="gone/base")
    for file in ("settings.json", "summary.json"):
        (tmp_path / "m" / file).write_text("{}")
    assert train.cli(["--model", folder, "--out", str(tmp_path / "o")]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "--model" in x]
    assert "gone/base" in line and "base_model_name_or_path" in line and "finished" not in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(peft_type="PROMPT_TUNING"), "only LoRA adapters can be read, not PROMPT_TUNING"),
        (dict(peft_type="IA3"), "only LoRA adapters can be read, not IA3"),
        (dict(alora_invocation_tokens=[3]), "not ALORA"),
        (dict(base_model_name_or_path=None), "without base_model_name_or_path"),
        (dict(r=8), "its adapter and base .* do not fit: .*size mismatch"),
        (dict(target_modules=["nowhere"]), "its adapter and base .* do not fit: .*nowhere"),
        (dict(target_modules=["q_proj", "lm_head"]), "its adapter and base .* do not fit: .*lm_head"),
    ],
)
def test_adapters_that_would_be_read_wrongly_are_refused(settings, message, saved, tmp_path):
    with pytest.raises(ValueError, match=message) as told:
        load(changed(saved, tmp_path / "m", **settings), CPU)
    assert str(told.value).startswith("--model ") and "\n" not in str(told.value)


def test_an_adapter_of_embeddings_or_head_is_refused(saved, tmp_path):
    """What reads the head's weights would not see its factors."""
    model = transformers.AutoModelForCausalLM.from_pretrained(saved / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="changes the embeddings or the head; .*merge_and_unload"):
        load(str(tmp_path), CPU)


def test_without_peft_an_adapter_is_one_line(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="--model .* is an adapter and needs peft: pip install peft"):
        load(str(saved / "runs/a"), CPU)


def test_all_weights_are_trained_after_an_adapter_was_merged(saved, tmp_path):
    """peft freezes what it adapts: the optimizer had nothing to train."""
    cfg = FAST | dict(lora_rank=0, steps=1, model=str(saved / "runs/a"), preset="tiny")
    run, rows = steps_of(tmp_path, "sft", **cfg)
    assert all(p.requires_grad for p in run.lm.model.parameters()) and rows[0]["grad_norm"] > 0


def test_an_adapter_of_an_adapted_model_keeps_both(saved, tmp_path):
    """It was saved with the first base, and so the first adapter was lost."""
    lm = load(str(saved / "runs/a"), CPU)
    first = logits(lm.model)
    lm.merge()
    lm.add_lora(2, 4, 0.0)
    move(lm, 0.02)
    lm.save(tmp_path / "b")
    again = load(str(tmp_path / "b"), CPU)
    assert_close(logits(again.model), logits(lm.model), rtol=1e-4, atol=1e-4)
    with again.adapter.disable_adapter():
        assert_close(logits(again.model), first, rtol=1e-4, atol=1e-4)
