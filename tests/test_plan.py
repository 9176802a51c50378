"""The plan: passes as they really happen, and no download."""

import pytest

import plan
import train
from config import RECIPES, make


@pytest.mark.parametrize("recipe", RECIPES)
def test_passes_are_those_of_a_real_step(recipe, tmp_path):
    cfg = make(
        recipe,
        out=str(tmp_path),
        steps=1,
        batch=4,
        micro_batch=4,
        eval_size=1,
        train_size=60,
        teacher_every=0,
        save_every=0,
    )
    run = train.start(cfg, tmp_path)
    count = []
    run.lm.model.model.register_forward_hook(
        lambda _, args, kwargs, out: count.append(not kwargs["use_cache"]), with_kwargs=True
    )

    class Quiet:
        stop = False

        def after_step(self, *_):
            pass

    with (tmp_path / "log.jsonl").open("w") as log:
        train.train(run, log, Quiet())
    assert sum(count) == sum(plan.passes_of(cfg).values())  # sampling is what uses a cache


def test_the_plan_of_a_model_that_is_not_here():
    text = plan.describe(make("unisd-star", model="Qwen2.5-0.5B", device="cpu"))
    assert "Qwen/Qwen2.5-0.5B-Instruct" in text and "3 agreement contexts" in text and "GiB" in text
    assert "as many as 1 epochs of scienceqa need" in text
    assert "unknown until the model is downloaded" in plan.describe(make("sd", model="someone/else", device="cpu"))


def test_lora_and_checkpointing_need_less_memory():
    size = plan.size_of("Qwen2.5-7B")
    full = plan.memory(make("sd", model="Qwen2.5-7B"), *size)
    lora = plan.memory(make("sd", model="Qwen2.5-7B", lora_rank=64), *size)
    both = plan.memory(make("sd", model="Qwen2.5-7B", lora_rank=64, grad_checkpointing=True), *size)
    assert both < lora < full and lora > 4 * size[0]


def test_a_local_folder_is_measured():
    parameters, layers, hidden = plan.size_of("tiny")
    assert 0.8e6 < parameters < 1.0e6 and (layers, hidden) == (3, 160)


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert train.cli(["--dry-run", "--out", str(tmp_path / "o"), "--device", "cpu"]) == 0
    assert "passes per step" in capsys.readouterr().out and not (tmp_path / "o").exists()
