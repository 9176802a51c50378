"""The plan: passes as they really happen, and no download."""

import json
import re

import pytest
import torch
from conftest import Unwatched
from transformers import Qwen2Config, Qwen2ForCausalLM

import train
from engine import plan
from engine.config import RECIPES, make
from experiments import bench
from tasks import jsonl

WITH_A_BUDGET = {f"a quarter by {u}": dict(agreement_budget=0.25, uncertainty=u) for u in ("entropy", "divergence")}
WITH_A_BUDGET["all, one the teacher's own"] = dict(agreement_budget=1.0, contexts_include_teacher=True)
WITH_A_BUDGET["a quarter, one the teacher's own"] = dict(agreement_budget=0.25, contexts_include_teacher=True)

QUICK = ("sft", "sd", "unisd-star", *WITH_A_BUDGET)  # the other recipes are parts of these


@pytest.mark.parametrize("recipe", [*QUICK, *(pytest.param(r, marks=pytest.mark.slow) for r in RECIPES if r not in QUICK)])
def test_passes_are_those_of_a_real_step(recipe, tmp_path):
    cfg = make(
        recipe if recipe in RECIPES else "unisd-star",
        **WITH_A_BUDGET.get(recipe, {}),
        out=str(tmp_path),
        steps=1,
        batch=4,
        micro_batch=4,
        eval_size=1,
        train_size=100,  # of fewer, contexts may be equal by chance, and then one is read
        max_new_tokens=12,
    )
    run = train.start(cfg, tmp_path)
    read = []  # answers read; sampling is what uses a cache
    run.lm.model.model.register_forward_hook(
        lambda _, args, kwargs, out: read.append(len(out[0]) * (not kwargs["use_cache"])), with_kwargs=True
    )

    with (tmp_path / "log.jsonl").open("w") as log:
        train.train(run, log, Unwatched(1))
    assert sum(read) == cfg.batch * sum(plan.passes_of(cfg).values())


def test_the_plan_of_a_model_that_is_not_here():
    text = plan.describe(make("unisd-star", model="Qwen2.5-0.5B", device="cpu"))
    assert "Qwen/Qwen2.5-0.5B-Instruct" in text and "0.75 agreement contexts" in text and "GiB" in text
    assert "as many as 1 epoch of scienceqa need" in text
    assert "unknown until the model is downloaded" in plan.describe(make("sd", model="someone/else", device="cpu"))


def test_lora_and_checkpointing_need_less_memory():
    size = plan.size_of("Qwen2.5-7B")
    full = plan.memory(make("sd", model="Qwen2.5-7B"), *size)
    lora = plan.memory(make("sd", model="Qwen2.5-7B", lora_rank=64), *size)
    both = plan.memory(make("sd", model="Qwen2.5-7B", lora_rank=64, grad_checkpointing=True), *size)
    assert both < lora < full and lora > 4 * size[0]


def test_a_local_folder_is_measured():
    parameters, layers, hidden, vocab = plan.size_of("tiny")
    assert 0.8e6 < parameters < 1.0e6 and (layers, hidden, vocab) == (3, 160, 776)


SHAPES = {
    "wide": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, vocab_size=8000),
    "many words": dict(hidden_size=128, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, vocab_size=30000),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", ["sft", "sd", "unisd-star"])
def test_the_memory_formula_against_a_measured_step(shape, recipe, monkeypatch):
    """Every tensor that is alive, counted during a step, weights and optimizer included."""
    config = Qwen2Config(**SHAPES[shape], num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True)
    monkeypatch.setattr(bench, "shaped_model", lambda *_, **__: Qwen2ForCausalLM(config).eval())
    run = bench.shaped_run(recipe, torch.device("cpu"))
    run.cfg.max_new_tokens, run.cfg.max_prompt_tokens = 60, 100
    for x in run.prompts.values():
        x.update(student=[5] * 100, teacher=[5] * 140, negative=[6] * 140, answer=[7] * 60)
        x["contexts"] = [[8 + k] * 140 for k in range(len(x["contexts"]))]  # of equal prompts only one would be read
    bench.one_step(run)
    averages = [s for e in (run.average, run.frozen) if e for s in e.shadow.values()]
    held = [*run.lm.model.parameters(), *averages]
    held += [v for s in run.optimizer.state.values() for v in s.values()]
    during = bench.peak_bytes(lambda: bench.one_step(run), torch.device("cpu"), held)
    measured = during + sum(4 * x.numel() for x in held)
    parameters = sum(p.numel() for p in run.lm.model.parameters())
    size = (SHAPES[shape][k] for k in ("num_hidden_layers", "hidden_size", "vocab_size"))
    ratio = plan.memory(run.cfg, parameters, *size) / measured
    print(f"{shape}, {recipe}: planned {ratio:.2f} of the measured {measured / 1e6:.0f} MB")
    assert 0.8 < ratio < 1.3


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert train.cli(["--dry-run", "--out", str(tmp_path / "o"), "--device", "cpu"]) == 0
    assert "passes per step" in capsys.readouterr().out and not (tmp_path / "o").exists()


def test_durations_are_written_as_one_would_say_them():
    assert [plan.duration(s) for s in (0.31, 119, 300, 10390)] == ["0.3 s", "119.0 s", "5.0 min", "2.9 h"]


def test_what_does_not_sample_is_not_billed_for_it(monkeypatch):
    monkeypatch.setattr(plan, "flops_per_second", lambda *_: 1e9)
    monkeypatch.setattr(plan, "SAMPLING", 1e-9)  # a sampled token costs centuries
    time = lambda recipe: plan.describe(make(recipe)).splitlines()[-2].split("roughly ")[1]
    assert " s a step" in time("sft") and " h a step" in time("sd")


def test_the_plan_says_what_its_estimate_assumes(tmp_path, monkeypatch):
    """A file's own prompts are short: 40 tokens of template, and one token for four letters of question and reference."""
    monkeypatch.setattr(plan, "flops_per_second", lambda *_: 1e12)
    lines = [json.dumps({"question": "q" * 60 + str(i), "reference": "r" * 40, "answer": "yes"}) for i in range(10)]
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    settings = dict(model="Qwen2.5-0.5B", data=str(tmp_path / "my.jsonl"))
    say = lambda **more: plan.describe(make("sd", **settings, **more)).splitlines()[-1]
    prompt = int(re.search(r"prompts of (\d+) tokens", say())[1])
    (question,) = {e.question.count("q") for e in jsonl.load_jsonl(tmp_path / "my.jsonl")[0].train if "q" * 60 in e.question}
    assert question >= 60 and 40 + 100 / 4 <= prompt <= 40 + 100 / 4 + 45  # the format's own words come on top
    assert "answers of 256, a quarter of --max-new-tokens 1024" in say()
    assert "answers of 8, a quarter of --max-new-tokens 32" in say(max_new_tokens=32)
    assert "prompts of 300 tokens" in plan.describe(make("sd", model="Qwen2.5-0.5B")).splitlines()[-1]
