"""Whole runs on the embedded model, with assertions; and every refusal, as a user would meet it."""

import errno
import json
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from engine import checkpoint, config, metrics, watch
from engine.config import RECIPES, Config, make, parse
from engine.rollout import TINY

FAST = dict(steps=3, batch=6, micro_batch=3, eval_size=2, train_size=100, teacher_every=2, sample_every=2, save_every=2)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def rows_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r not in ("raw", "privileged")])
def test_every_recipe_trains(recipe, tmp_path):
    summary = train.main(make(recipe, out=str(tmp_path / "o"), **FAST))
    rows = rows_of(tmp_path / "o")
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert all(math.isfinite(v) for r in rows for v in r.values())
    assert {"loss", "entropy", "length", "eos", "weight", "grad_norm", "s_sampling", "s_scoring", "s_update"} <= set(rows[0]) | {
        "entropy"
    }
    assert "student_accuracy" in rows[1] and ("teacher_accuracy" in rows[1]) == make(recipe).uses_teacher
    before, after = weights(TINY), weights(tmp_path / "o")
    assert any((before[n] != after[n]).any() for n in before)
    assert AutoTokenizer.from_pretrained(tmp_path / "o").chat_template
    assert summary["recipe"] == recipe and summary["steps"] == 3 and (tmp_path / "o" / "curves.png").stat().st_size > 5000
    assert json.loads((tmp_path / "o" / "summary.json").read_text()) == summary
    assert {"accuracy", "by_task", "jsd_to_base", "retention_ppl"} <= set(summary["after"]) and summary["after"]["jsd_to_base"] > 0
    expected = {"div": "w_div", "contrast": "w_contrast", "match": "w_match"}
    cfg = make(recipe)
    assert {k for k in expected if k in rows[0]} == {k for k, w in expected.items() if getattr(cfg, w)}


def test_raw_only_evaluates(tmp_path):
    summary = train.main(make("raw", out=str(tmp_path), **(FAST | dict(steps=0))))
    assert summary["after"]["accuracy"] == summary["before"]["accuracy"] and summary["after"]["jsd_to_base"] < 1e-6
    assert 1.01 < summary["after"]["retention_ppl"] < 1.5  # the base on its own answers: not certain, so not 1
    after, before = weights(tmp_path), weights(TINY)
    assert all((after[n] == before[n]).all() for n in before)


def test_the_loss_falls_on_one_batch(tmp_path):
    """Twenty steps on six questions: the divergence must shrink, or nothing is learned at all."""
    train.main(make("sd", out=str(tmp_path), **(FAST | dict(steps=25, train_size=5, batch=20, micro_batch=20, teacher_every=0))))
    rows = rows_of(tmp_path)
    assert sum(r["div"] for r in rows[-5:]) < 0.7 * sum(r["div"] for r in rows[:5])


def test_same_seed_same_run_and_the_micro_batch_does_not_matter(tmp_path):
    """Samples come from the same random numbers, so whole runs must agree, up to the order of fp32 sums."""
    for name, micro in (("a", 6), ("b", 2), ("c", 6)):
        train.main(make("unisd-star", out=str(tmp_path / name), **(FAST | dict(micro_batch=micro))))
    a, b, c = (weights(tmp_path / n) for n in "abc")
    assert all((a[n] == c[n]).all() for n in a)
    for n in a:
        assert_close(a[n], b[n], rtol=1e-3, atol=2e-4)


def test_every_recipe_sees_the_same_examples_in_the_same_order():
    first = train.order(100, seed=3, start=0, count=250)
    assert sorted(first[:100]) == list(range(100)) and sorted(first[100:200]) == list(range(100))
    assert first[:100] != first[100:200]
    assert train.order(100, 3, 80, 70) == first[80:150] and train.order(100, 4, 0, 100) != first[:100]


def test_references_as_completions_end_like_a_turn(tmp_path):
    run = train.start(make("sft", out=str(tmp_path), **FAST), tmp_path)
    p = [run.prompts[i] for i in range(4)]
    ids, mask = train.write_answers(run, p, [0, 1, 2, 3], {})
    for i in range(4):
        text = run.lm.tokenizer.decode(ids[i][mask[i].bool()])
        assert text == run.task.train[i].target + "<|im_end|>"


def test_a_cut_reference_gets_no_end(tmp_path):
    run = train.start(make("sft", out=str(tmp_path), **(FAST | dict(max_new_tokens=3))), tmp_path)
    ids, mask = train.write_answers(run, [run.prompts[i] for i in range(4)], [0, 1, 2, 3], {})
    for i, row in enumerate(ids):
        whole = run.lm.tokenizer(run.task.train[i].target)["input_ids"]
        assert (row[mask[i].bool()][-1] in run.lm.eos) == (len(whole) < 3)


def test_every_flag_goes_with_every_recipe(tmp_path):
    """Ceilings where there is no divergence, bf16 with a teacher that borrows the weights, no gradient limit."""
    one = FAST | dict(steps=1, teacher_every=0, save_every=0)
    with pytest.warns(UserWarning, match="caps the divergence"):
        cfg = make("sft", clip=2.0, out=str(tmp_path / "a"), **one)
    train.main(cfg)
    with pytest.warns(UserWarning, match="caps the divergence"):
        cfg = make("match-repr", clip_quantile=0.9, out=str(tmp_path / "b"), **one)
    train.main(cfg)
    train.main(make("sd", grad_norm=0.0, out=str(tmp_path / "c"), **one))
    before, after = weights(TINY), weights(tmp_path / "c")
    assert any((before[n] != after[n]).any() for n in before)


def test_under_autocast_the_ceiling_is_the_students_not_the_teachers(tmp_path):
    """Autocast remembers its casts of the weights, and the teacher borrows the parameters: one autocast for both would
    read the student with the teacher's weights. Student and teacher differ here, so their divergences at a quantile do
    too."""
    ceilings = {}
    for dtype in ("fp32", "bf16"):
        run = train.start(make("sd", clip_quantile=0.5, dtype=dtype, out=str(tmp_path), **FAST), tmp_path)
        torch.manual_seed(0)
        with torch.no_grad():
            for p in run.lm.model.parameters():
                p.add_(0.1 * torch.randn_like(p))  # far from the frozen teacher
        seen, real = [], train.quantile_ceiling
        train.quantile_ceiling = lambda *a, seen=seen, real=real: seen.append(real(*a)) or seen[-1]

        class Quiet:
            stop = False

            def after_step(self, run, *_):
                self.stop = True

        try:
            with (tmp_path / "log").open("w") as log:
                train.train(run, log, Quiet())
        finally:
            train.quantile_ceiling = real
        ceilings[dtype] = seen[0].item()
    assert ceilings["bf16"] == pytest.approx(ceilings["fp32"], rel=0.3)


def test_schedule():
    cfg = make("sd", steps=100, warmup=0.1)
    rates = [train.schedule(s, cfg) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0 and rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001 and rates[10:] == sorted(rates[10:], reverse=True)


def test_nan_loss_names_the_step_and_saves_the_batch(tmp_path, monkeypatch):
    real = train.chunked_objective

    def broken(*args):
        loss, values = real(*args)
        return loss * float("nan"), values

    monkeypatch.setattr(train, "chunked_objective", broken)
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan"):
        train.main(make("sd", out=str(tmp_path), **FAST))
    saved = json.loads((tmp_path / "bad-batch-step1.json").read_text())
    assert len(saved["rows"]) == 6 and saved["rows"][0]["prompt"].endswith("assistant\n")


def test_a_full_disk_is_one_clear_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    real, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(checkpoint.DiskFull, match="disk is full"):
        train.main(make("sd", out=str(tmp_path), **(FAST | dict(steps=5, save_every=2))))
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == ["checkpoint-2"] and not list(tmp_path.glob(".writing*"))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(ValueError, match="GB free"):
        train.main(make("sd", out=str(tmp_path / "other"), **FAST))


REFUSED = {
    ("--lrr", "1"): "unrecognized arguments: --lrr",
    ("--recipe", "magic"): "invalid choice: 'magic'",
    ("--lr", "fast"): "invalid float value",
    ("--lr", "nan"): "--lr is nan",
    ("--lr", "-1"): "--lr -1.0 is negative",
    ("--agreement", "token", "--contexts", "1"): "the variance of one reading is undefined; set --contexts 2",
    ("--divergence", "jsd", "--alpha", "1"): "--alpha 1.0 must lie strictly between 0 and 1",
    ("--recipe", "ema", "--ema-decay", "1"): "--ema-decay 1.0: 1 never moves",
    ("--clip", "1", "--clip-quantile", "0.9"): "two ceilings",
    ("--estimator", "sampled"): "add --divergence reverse",
    ("--data", "gpqa"): "for evaluation only",
    ("--data", "no-such-set"): "no such data set",
    ("--data", "missing.jsonl"): "missing.jsonl",
    ("--data", "mbpp"): "not cached here",
    ("--train-size", "0"): "--train-size and --eval-size must be at least 1",
    ("--data", "mbpp", "--wrong-references", "0.2"): "tiny world only",
    ("--w-div", "0", "--w-contrast", "0", "--w-match", "0"): "nothing to minimise",
    ("--batch", "0"): "--batch must be at least 1",
    ("--temperature", "0"): "--temperature must be above 0",
    ("--on-policy", "1.5"): "--on-policy 1.5 is outside",
    ("--device", "cuda:9"): "--device cuda:9",
    ("--model", "Qwen2.5-0.5B"): "hub cannot be reached",
    ("--model", "no-such-model"): "hub cannot be reached",
    ("--max-prompt-tokens", "4"): "--max-prompt-tokens",
    ("--max-new-tokens", "600"): "leaves no room in the model's context",
}


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_refused_with_one_line_that_names_the_setting(flags, tmp_path, capsys):
    out = ["--out", str(tmp_path / "o"), "--steps", "1", "--eval-size", "1", "--batch", "2"]
    if torch.cuda.is_available() and "cuda:9" in flags:
        pytest.skip("needs a machine without CUDA")
    try:
        code = train.cli([*out, *flags])
    except SystemExit as stop:
        code = stop.code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and REFUSED[flags] in message, message


def test_warned_about(tmp_path):
    with pytest.warns(UserWarning, match="can never act"):
        make("sd", divergence="jsd", clip=0.7)
    with pytest.warns(UserWarning, match="has no effect"):
        make("match-repr", agreement="token")
    with pytest.warns(UserWarning, match="never moves"):
        make("ema", steps=5)


@pytest.mark.parametrize("recipe, shown, said", [("sd", 40.0, 1), ("sd", 40.1, 0), ("sft", 10.0, 0)])
def test_a_reference_that_does_not_help_is_said_before_training(recipe, shown, said, tmp_path, monkeypatch):
    result = lambda accuracy: {"accuracy": accuracy, "by_task": {"sum": accuracy}}
    monkeypatch.setattr(metrics, "measure", lambda lm, task, examples, shows, size: result(shown if shows else 40.0))
    run = SimpleNamespace(cfg=make(recipe), lm=None, task=SimpleNamespace(test=[0], ood=[]))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        watch.before_training(run, tmp_path)
    assert sum("nothing to teach" in str(w.message) for w in seen) == said


def test_another_runs_folder_is_refused(tmp_path, capsys):
    train.main(make("raw", out=str(tmp_path), **(FAST | dict(steps=0))))
    assert train.cli(["--out", str(tmp_path)]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert train.cli(["--out", str(tmp_path / "nothing"), "--resume"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert train.cli(["--out", str(tmp_path), "--resume", "--lr", "0.5"]) == 2
    assert "--lr is 0.5 here" in capsys.readouterr().err


def test_resume_without_out_finds_the_default_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fast = "--steps 1 --batch 2 --micro-batch 2 --eval-size 1 --train-size 50 --teacher-every 0 --device cpu".split()
    assert train.cli(["--recipe", "sd", *fast]) == 0
    assert train.cli(["--recipe", "sd", "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out


def test_flags_win_over_recipes_and_recipes_over_presets():
    cfg = parse(["--recipe", "ema", "--clip", "2.0"])
    assert cfg.teacher == "ema" and cfg.clip == 2.0 and cfg.lr == config.PRESETS["tiny"]["lr"]
    assert parse(["--recipe", "ema", "--teacher", "frozen"]).teacher == "frozen"
    assert parse([]) == make() == make("unisd-star") and parse([]).recipe == "unisd-star"
    assert parse(["--model", "Qwen2.5-0.5B", "--recipe", "sd"]).lr == config.PRESETS["real"]["lr"] != Config.lr
    with pytest.raises(ValueError, match="does not exist"):
        make("magic")


def test_presets():
    cfg = parse(["--model", "Qwen2.5-0.5B", "--preset", "official"])
    assert (cfg.lora_rank, cfg.lora_alpha, cfg.lr, cfg.batch, cfg.gamma) == (64, 128, 2e-5, 32, 0.001)
    assert (cfg.temperature, cfg.max_prompt_tokens, cfg.max_new_tokens, cfg.epochs) == (0.7, 3072, 1024, 1.0)
    assert (cfg.ema_decay, cfg.ema_every, cfg.w_contrast, cfg.margin, cfg.w_match) == (0.98, 10, 0.01, 0.1, 0.01)
    assert parse(["--model", "Qwen2.5-0.5B", "--recipe", "agree-seq", "--preset", "official"]).gamma == 0.01
    assert parse(["--model", "Qwen2.5-0.5B"]).data == "scienceqa" and parse(["--model", "Qwen2.5-0.5B"]).lora_rank == 0
    assert cfg.train_size == cfg.eval_size == parse(["--model", "Qwen2.5-0.5B"]).train_size == 0  # all there is


def test_runs_of_different_models_and_data_have_different_folders(tmp_path, monkeypatch):
    where = lambda *flags: config.default_out(parse([*flags]))
    assert where() == "runs/unisd-star-seed0" and where("--out", "here") == "here"
    assert where("--model", "org/Some-0.5B", "--seed", "2") == "runs/Some-0.5B-scienceqa-unisd-star-seed2"
    assert where("--data", "a/my.jsonl", "--recipe", "sd") == "runs/my-sd-seed0"
    monkeypatch.chdir(tmp_path)  # --resume without --out finds that folder, and the settings in it
    Path("runs/my-sd-seed0").mkdir(parents=True)
    settings = vars(make("sd", data="my.jsonl", lr=0.5))
    Path("runs/my-sd-seed0/settings.json").write_text(json.dumps(settings))
    assert parse(["--data", "my.jsonl", "--recipe", "sd", "--resume"]).lr == 0.5
    assert parse(["--recipe", "sd", "--resume"]).lr != 0.5


def test_departures_from_the_official_settings_are_said(tmp_path, capsys):
    fast = FAST | dict(steps=1, epochs=0.0, data="tiny", max_new_tokens=40, max_prompt_tokens=400, lora_rank=0)
    train.main(make("raw", model="tiny", preset="official", out=str(tmp_path), **(fast | dict(steps=0))))
    assert "official settings, except" in capsys.readouterr().out


def test_epochs_become_steps(tmp_path):
    summary = train.main(make("sft", out=str(tmp_path), **(FAST | dict(steps=0, epochs=0.5, train_size=40, batch=10))))
    assert summary["steps"] == 2


def test_help_shows_every_setting_with_its_default(capsys):
    def shown(*argv):
        with pytest.raises(SystemExit) as stop:
            parse([*argv, "--help"])
        assert stop.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    text = shown()
    assert "peak learning rate, AdamW (default: 0.001)" in text  # the tiny model's, not the dataclass's
    assert "peak learning rate, AdamW (default: 5e-06)" in shown("--model", "Qwen2.5-0.5B", "--recipe", "sft")
    for f in config.fields(Config):
        assert "--" + f.name.replace("_", "-") in text, f.name
    assert text.count("(default:") >= len(config.fields(Config))
