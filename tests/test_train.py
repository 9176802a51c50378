"""Whole runs on the embedded model, with assertions; and every refusal, as a user would meet it."""

import errno
import json
import math
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Unwatched, rows_of, steps_of
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
import unisd
from engine import build, checkpoint, config, metrics, watch
from engine.config import RECIPES, Config, make, parse
from engine.parallel import ALONE
from engine.pretrained import TINY
from tasks import world
from tasks.data import Example

FAST = dict(steps=3, batch=6, micro_batch=3, eval_size=1, train_size=40, max_new_tokens=24)
FAST |= dict(teacher_every=2, sample_every=2, save_every=2)
FEW = dict(steps=3, batch=6, micro_batch=3, eval_size=1, train_size=20, max_new_tokens=16)  # for what looks at the steps alone


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def timed_rows(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


EVALUATED = [r for r in RECIPES if r not in ("raw", "privileged")]


@pytest.mark.slow  # quick are: 20 steps of unisd-star (below), and one step of every recipe (test_plan.py)
@pytest.mark.parametrize("recipe", EVALUATED)
def test_every_recipe_trains(recipe, tmp_path):
    summary = train.main(make(recipe, out=str(tmp_path / "o"), **FAST))
    check_run(tmp_path / "o", recipe, 3)
    rows = rows_of(tmp_path / "o")
    assert "student_accuracy" in rows[1] and ("teacher_accuracy" in rows[1]) == make(recipe).uses_teacher
    assert json.loads((tmp_path / "o" / "summary.json").read_text()) == summary


def check_run(out, recipe, steps):
    """What every finished run leaves behind."""
    rows, cfg = timed_rows(out), make(recipe)
    assert [r["step"] for r in rows] == [*range(1, steps + 1)]
    assert all(math.isfinite(v) for r in rows for v in r.values())
    assert {"loss", "length", "eos", "weight", "grad_norm", "s_sampling", "s_scoring", "s_update"} <= set(rows[0])
    expected = {"div": "w_div", "contrast": "w_contrast", "match": "w_match"}
    assert {k for k in expected if k in rows[0]} == {k for k, w in expected.items() if getattr(cfg, w)}
    before, after = weights(TINY), weights(out)
    assert any((before[n] != after[n]).any() for n in before)
    assert AutoTokenizer.from_pretrained(out).chat_template
    summary = json.loads((out / "summary.json").read_text())
    assert summary["recipe"] == recipe and summary["steps"] == steps and (out / "curves.png").stat().st_size > 5000
    assert {"accuracy", "by_task", "jsd_to_base", "retention_ppl"} <= set(summary["after"]) and summary["after"]["jsd_to_base"] > 0
    return summary


def test_twenty_steps_from_end_to_end(twenty):
    """A whole run as `python train.py` does it, and what it leaves behind for others."""
    summary, rows = check_run(twenty, "unisd-star", 20), rows_of(twenty)
    assert [r["step"] for r in rows if "teacher_accuracy" in r and "student_accuracy" in r] == [1, 10, 20]
    for side in (summary["before"], summary["after"], summary["ceiling"], summary["ood"]["after"]):
        assert 0 <= side["accuracy"] <= 100
    assert len(summary["after"]["by_task"]) == 5 and all(0 <= v <= 100 for v in summary["after"]["by_task"].values())
    assert 1 < summary["after"]["retention_ppl"] < 10 and 1 < summary["after"]["reverse_ppl"] < 10
    assert not checkpoint.all_checkpoints(twenty) and not list(twenty.glob(".writing*"))
    settings = json.loads((twenty / "settings.json").read_text())
    assert settings["recipe"] == "unisd-star" and settings["steps"] == 20 and config.saved_settings(str(twenty)) == settings
    tokenizer, model = AutoTokenizer.from_pretrained(twenty), AutoModelForCausalLM.from_pretrained(twenty)
    changed = changed_answers(twenty)
    assert changed
    for question, told in [("12+31", None), *changed[:3]]:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        text = tokenizer.decode(model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :])
        assert text.endswith("<|im_end|>") and (" so " in text or told)  # a plain transformers model that answers and stops
        # What is called the trained model's answer is this model's, not one that was kept from before (on a GPU, it once was).
        assert told is None or text.removesuffix("<|im_end|>").strip() == told


def changed_answers(out):
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["question"], row["after"]) for row in rows if row["before"] != row["after"]]


def test_raw_only_evaluates(tmp_path):
    summary = train.main(make("raw", out=str(tmp_path), **(FAST | dict(steps=0, eval_size=2, max_new_tokens=40))))
    assert summary["after"]["accuracy"] == summary["before"]["accuracy"] and summary["after"]["jsd_to_base"] < 1e-6
    assert 1.01 < summary["after"]["retention_ppl"] < 1.5  # the base on its own answers: not certain, so not 1
    after, before = weights(tmp_path), weights(TINY)
    assert all((after[n] == before[n]).all() for n in before)


def test_the_loss_falls_on_one_batch(tmp_path):
    """Twelve steps on five questions: the divergence must shrink, or nothing is learned at all."""
    _, rows = steps_of(tmp_path, "sd", **(FEW | dict(steps=12, train_size=5, batch=10, micro_batch=10)))
    assert sum(r["div"] for r in rows[-4:]) < 0.7 * sum(r["div"] for r in rows[:4])


def test_same_seed_same_run_and_the_micro_batch_does_not_matter(tmp_path):
    """Samples come from the same random numbers, so whole runs must agree, up to the order of fp32 sums."""
    runs = [steps_of(tmp_path / name, **(FEW | dict(steps=2, micro_batch=micro))) for name, micro in (("a", 6), ("b", 2), ("c", 6))]
    (a, b, c), rows = (run.lm.model.state_dict() for run, _ in runs), [rows for _, rows in runs]
    assert rows[0] == rows[2] and all((a[n] == c[n]).all() for n in a)
    for n in a:
        assert_close(a[n], b[n], rtol=1e-3, atol=2e-4)


def test_a_micro_batch_holds_rows_of_similar_length(tmp_path, monkeypatch):
    """It is padded to its longest row: sorted, 64 rows of 70 to 1,424 tokens, four at a time, take 0.64 of the positions."""
    seen = []

    def spy(model, prompts, ids, mask):
        seen.append([len(p) + n for p, n in zip(prompts, mask.sum(1).tolist(), strict=True)])
        return unisd.read(model, prompts, ids, mask)

    monkeypatch.setattr(train, "read", spy)
    steps_of(tmp_path, "sd", **(FEW | dict(steps=1, micro_batch=2)))
    lengths = sum(seen, [])
    assert [len(part) for part in seen] == [2, 2, 2] and lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_every_recipe_sees_the_same_examples_in_the_same_order():
    first = train.order(100, seed=3, start=0, count=250)
    assert sorted(first[:100]) == list(range(100)) and sorted(first[100:200]) == list(range(100))
    assert first[:100] != first[100:200]
    assert train.order(100, 3, 80, 70) == first[80:150] and train.order(100, 4, 0, 100) != first[:100]


def test_worked_answers_train_too(tmp_path):
    """The base writes in this style already: its loss on worked answers begins low, on terse references high."""
    few, loss = FEW | dict(steps=1, max_new_tokens=40), {}
    for recipe in ("sft", "sft-worked"):
        _, (row,) = steps_of(tmp_path / recipe, recipe, **few)
        assert row["nll"] == pytest.approx(row["loss"]) and "div" not in row
        loss[recipe] = row["loss"]
    assert loss["sft-worked"] < 1 and loss["sft"] > 5


@pytest.mark.parametrize("recipe", ["sft", "sft-worked"])
def test_references_as_completions_end_like_a_turn(recipe, tmp_path):
    """The terse references, or the worked answers in the model's own style; all of them are right."""
    run = train.start(make(recipe, out=str(tmp_path), **(FEW | dict(max_new_tokens=40))), tmp_path)
    p = [run.prompts[i] for i in range(4)]
    ids, mask = train.write_answers(run, p, [0, 1, 2, 3], {})
    texts = [run.lm.tokenizer.decode(ids[i][mask[i].bool()]) for i in range(4)]
    examples = run.task.train[:4]
    assert texts == [(e.demo if recipe == "sft-worked" else e.target) + "<|im_end|>" for e in examples]
    assert all(r["correct"] for r in world.score(examples, [t.removesuffix("<|im_end|>") for t in texts]))
    assert recipe == "sft" or not set(texts) & {e.target + "<|im_end|>" for e in examples}


def test_worked_answers_must_be_there(tmp_path, capsys):
    lines = [dict(question=f"{i} + {i}", reference=f"Answer: {2 * i}", answer=2 * i) for i in range(10, 18)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--data", str(tmp_path / "mine.jsonl"), "--recipe", "sft-worked", "--steps", "1", "--batch", "2", "--device", "cpu"]
    assert train.cli([*flags, "--out", str(tmp_path / "o")]) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert "--sft-target worked" in message and "has no worked answers" in message and "use --sft-target reference" in message


def test_a_cut_reference_gets_no_end(tmp_path):
    run = train.start(make("sft", out=str(tmp_path), **(FEW | dict(max_new_tokens=3))), tmp_path)
    ids, mask = train.write_answers(run, [run.prompts[i] for i in range(4)], [0, 1, 2, 3], {})
    for i, row in enumerate(ids):
        whole = run.lm.tokenizer(run.task.train[i].target)["input_ids"]
        assert (row[mask[i].bool()][-1] in run.lm.eos) == (len(whole) < 3)


def test_every_flag_goes_with_every_recipe(tmp_path):
    """Ceilings where there is no divergence, no gradient limit."""
    one = FEW | dict(steps=1)
    with pytest.warns(UserWarning, match="caps the divergence"):
        steps_of(tmp_path / "a", "sft", clip=2.0, **one)
    with pytest.warns(UserWarning, match="caps the divergence"):
        steps_of(tmp_path / "b", "match-repr", clip_quantile=0.9, **one)
    run, _ = steps_of(tmp_path / "c", "sd", grad_norm=0.0, **one)
    before, after = weights(TINY), run.lm.model.state_dict()
    assert any((before[n] != after[n]).any() for n in before)


def test_under_autocast_the_ceiling_is_the_students_not_the_teachers(tmp_path):
    """Autocast remembers its casts of the weights, and the teacher borrows the parameters: one autocast for both would
    read the student with the teacher's weights. Student and teacher differ here, so their divergences at a quantile do
    too."""
    ceilings = {}
    for dtype in ("fp32", "bf16"):
        run = train.start(make("sd", clip_quantile=0.5, dtype=dtype, out=str(tmp_path), **FEW), tmp_path)
        torch.manual_seed(0)
        with torch.no_grad():
            for p in run.lm.model.parameters():
                p.add_(0.1 * torch.randn_like(p))  # far from the frozen teacher
        seen, real = [], train.quantile_ceiling
        train.quantile_ceiling = lambda *a, seen=seen, real=real: seen.append(real(*a)) or seen[-1]

        try:
            with (tmp_path / "log").open("w") as log:
                train.train(run, log, Unwatched(1))
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
        steps_of(tmp_path, "sd", **FEW)
    saved = json.loads((tmp_path / "bad-batch-step1.json").read_text())
    assert len(saved["rows"]) == 6 and saved["rows"][0]["prompt"].endswith("assistant\n")


# --- fp16: the loss is scaled, an overflow is no failure, anything else is ---------------------------------------------


def scale_of(monkeypatch, first):
    """Every run begins with this scale instead of 65,536."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(build.torch.amp, "GradScaler", lambda device, enabled: scaler(device, enabled=enabled, init_scale=first))


def test_fp16_trains_like_fp32(tmp_path):
    """On the same answers, the references: samples could differ after a rounding. And by small steps: the usual 1e-3 throws so
    small a batch from 0.60 to 2.35, and such a step makes 0.1 % of rounding 1.4 % two steps later (0.2 % with 1e-4).
    """
    # 1 %, or what this CPU's fp16 product loses, 25 times: some add up in fp16 (a CPU with fp16 units was 1.5 % off).
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    rounding, rows = ((a.half() @ b.half()).float() - a @ b).norm() / (a @ b).norm(), {}
    off = max(0.01, 25 * rounding.item())
    for dtype in ("fp32", "fp16"):
        run, rows[dtype] = steps_of(tmp_path / dtype, "sd", on_policy=0.0, dtype=dtype, lr=1e-4, **FEW)
        assert run.scaler.is_enabled() == (dtype == "fp16") and run.loss_scale() == (65536.0 if dtype == "fp16" else 1.0)
        assert all(p.dtype == torch.float32 for p in run.lm.model.parameters())
    for a, b in zip(rows["fp32"], rows["fp16"], strict=True):
        assert math.isfinite(b["loss"]) and b["loss"] == pytest.approx(a["loss"], rel=off)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2 * off)  # measured before the limit, after the scale is off


@pytest.mark.slow
def test_an_overflow_skips_the_update_and_halves_the_scale(tmp_path, monkeypatch):
    scale_of(monkeypatch, 2.0**40)
    run, rows = steps_of(tmp_path, "sd", dtype="fp16", **(FEW | dict(steps=2)))
    before, after = weights(TINY), run.lm.model.state_dict()
    assert len(rows) == 2 and run.scaler.get_scale() == 2.0**38 and all((before[n] == after[n]).all() for n in before)
    assert all(math.isfinite(r["loss"]) and not math.isfinite(r["grad_norm"]) for r in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "scale", "broken"), [("fp16", 65536.0, "loss"), ("fp16", 0.5, "gradient"), ("fp32", 1.0, "gradient")]
)
def test_what_is_no_overflow_still_raises(dtype, scale, broken, tmp_path, monkeypatch):
    """A loss that is no number, and an infinite gradient where there is no scale to halve: in fp32, or at a scale below 1."""
    scale_of(monkeypatch, scale)
    real = train.chunked_objective

    def objective(*args):
        loss, values = real(*args)
        if broken == "gradient":
            loss.register_hook(lambda grad: grad * math.inf)
        return loss * (math.nan if broken == "loss" else 1), values

    monkeypatch.setattr(train, "chunked_objective", objective)
    with pytest.raises(FloatingPointError, match="step 1: the loss is "):
        steps_of(tmp_path, "sd", dtype=dtype, **FEW)


# --- what a user meets --------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_clear_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    real, calls = torch.save, []

    def full(*args, **kwargs):
        calls.extend([1] * str(args[1]).endswith("state.pt"))  # not the answers that are kept while a run lasts
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(checkpoint.DiskFull, match="disk is full"):
        train.main(make("sft", out=str(tmp_path), **(FEW | dict(teacher_every=0, save_every=1))))
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == ["checkpoint-1"] and not list(tmp_path.glob(".writing*"))
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
    ("--data", "mbpp", "--references", "faint"): "tiny world only",
    ("--data", "mbpp", "--fresh-references"): "tiny world only",
    ("--references", "pale"): "invalid choice: 'pale'",
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
    out = ["--out", str(tmp_path / "o"), "--steps", "1", "--eval-size", "1", "--train-size", "20", "--batch", "2"]
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
    for name in ("contexts_include_teacher", "fresh_references"):
        with pytest.warns(UserWarning, match=name.replace("_", "-") + " has no effect: no context is read"):
            make("sd", **{name: True})
    with pytest.warns(UserWarning, match="--fresh-references has no effect: no context holds a reference"):
        make("agree-token", fresh_references=True, context_reference=False)


@pytest.mark.parametrize("recipe, shown, said", [("sd", 40.0, 1), ("sd", 40.1, 0), ("sft", 10.0, 0)])
def test_a_reference_that_does_not_help_is_said_before_training(recipe, shown, said, tmp_path, monkeypatch):
    result = lambda accuracy: {"accuracy": accuracy, "by_task": {"sum": accuracy}}
    monkeypatch.setattr(metrics, "measure", lambda lm, task, examples, shows, size, kept=None: result(shown if shows else 40.0))
    run = SimpleNamespace(cfg=make(recipe), lm=None, ranks=ALONE, task=SimpleNamespace(test=[0], ood=[]))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        watch.before_training(run, tmp_path)
    assert sum("nothing to teach" in str(w.message) for w in seen) == said


def test_another_runs_folder_is_refused(twenty, tmp_path, capsys):
    assert train.cli(["--out", str(twenty)]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert train.cli(["--out", str(tmp_path / "nothing"), "--resume"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert train.cli(["--out", str(twenty), "--resume", "--lr", "0.5"]) == 2
    assert "--lr is 0.5 here" in capsys.readouterr().err


def test_a_run_that_is_stopped_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    class StopAtOne(train.Watch):
        def after_step(self, run, row, batch):
            super().after_step(run, row, batch)
            self.stop = True

    monkeypatch.setattr(train, "Watch", StopAtOne)
    flags = "--recipe sd --steps 3 --batch 2 --micro-batch 2 --eval-size 1 --train-size 10 --teacher-every 0 --device cpu".split()
    assert train.cli([*flags, "--out", str(tmp_path)]) == 130
    told = capsys.readouterr().out
    assert f"stopped at step 1 of 3; go on with: python train.py --out {tmp_path} --resume" in told
    assert (tmp_path / "checkpoint-1" / "state.pt").exists() and not (tmp_path / "summary.json").exists()


@pytest.mark.slow
def test_resume_without_out_finds_the_default_folder(tmp_path, monkeypatch, capsys, no_picture):
    monkeypatch.chdir(tmp_path)
    fast = "--steps 1 --batch 2 --micro-batch 2 --eval-size 1 --train-size 10 --teacher-every 0 --device cpu".split()
    assert train.cli(["--recipe", "sft", *fast]) == 0
    assert train.cli(["--recipe", "sft", "--resume"]) == 0
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
    train.start(make("raw", model="tiny", preset="official", out=str(tmp_path), **(fast | dict(steps=0))), tmp_path)
    assert "official settings, except" in capsys.readouterr().out


def test_epochs_become_steps(tmp_path):
    run, rows = steps_of(tmp_path, "sft", **(FEW | dict(steps=0, epochs=0.5, train_size=40, batch=10)))
    assert run.cfg.steps == run.step == len(rows) == 2


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


def test_a_sample_shows_question_answer_reference_and_verdict(monkeypatch):
    e = Example("sum", "what is 2 + 2?\n" + "x" * 100, "it is\n4")
    said = watch.sample(7, e, "5 \x1b[31m!", False, 40).splitlines()
    assert [line[:12].strip() for line in said] == ["step 7", "wrong", "reference"] and all(len(line) < 40 for line in said)
    assert "what is 2 + 2? xxx" in said[0] and "5 \\x1b[31m!" in said[1] and "it is 4" in said[2]  # no escape gets through
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert watch.sample(7, e, "4", True, 40).splitlines()[1].startswith("\x1b[32m  right")
    assert "not scored" in watch.sample(7, e, "4", None, 40)
