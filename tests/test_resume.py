"""N steps = k steps, a real kill -9, and --resume: the same log and the same weights, bit for bit, wherever the kill
falls.
"""

import contextlib
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import TWENTY, rows_of, steps_of
from safetensors.torch import load_file

import train
from engine import checkpoint, config, watch
from engine.config import make, parse
from engine.pretrained import TINY

ROOT = Path(__file__).parents[1]


def start(out, *more):
    command = [sys.executable, "train.py", *TWENTY, "--out", str(out), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps_done(out):
    log = Path(out) / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def weights(out):
    (file,) = Path(out).glob("*model.safetensors")  # of a model or of an adapter
    return load_file(file)


def assert_same_rows(out, straight):
    pairs = zip(rows_of(out), rows_of(straight), strict=True)
    same = lambda x, y: x == y or (x != x and y != y)  # nan, too, is nan again
    assert not [(a["step"], k, a.get(k), b.get(k)) for a, b in pairs for k in a.keys() | b.keys() if not same(a.get(k), b.get(k))]


def assert_same(out, straight):
    assert_same_rows(out, straight)
    ours, theirs = weights(out), weights(straight)
    assert ours.keys() == theirs.keys() and all((ours[n] == theirs[n]).all() for n in ours)


def wait_for(out, process, steps):
    while steps_done(out) < steps and process.poll() is None:
        time.sleep(0.01)


def kill_after(out, steps):
    process = start(out)
    wait_for(out, process, steps)
    process.send_signal(signal.SIGKILL)
    return process.wait()


def test_killed_once_and_resumed_it_is_the_run_that_was_never_killed(tmp_path, request, capsys, no_picture):
    """A real SIGKILL of another process, somewhere after its second checkpoint; this one goes on."""
    out = tmp_path / "o"
    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill_after, out, 8)
        twenty = request.getfixturevalue("twenty")  # the run that was never killed, on the other core
    assert killed.result() == -signal.SIGKILL
    done, whole = steps_done(out), int(checkpoint.all_checkpoints(out)[-1].name.split("-")[1])
    assert 8 <= done < 20 and 6 <= whole <= done
    train.main(parse([*TWENTY, "--out", str(out), "--resume"]))
    assert f"resumed at step {whole} of 20" in capsys.readouterr().out
    assert_same(out, twenty)


@pytest.mark.slow
def test_the_scale_of_fp16_is_in_the_checkpoint(tmp_path, monkeypatch, tiny):
    """The first step overflows, the second does not: it must find the scale that the first has left."""
    real, calls = train.chunked_objective, []

    def objective(*args):
        loss, values = real(*args)
        calls.append(loss)
        if len(calls) == 1:
            loss.register_hook(lambda grad: grad * math.inf)
        return loss, values

    monkeypatch.setattr(train, "chunked_objective", objective)
    fast = dict(steps=2, batch=4, micro_batch=4, eval_size=1, train_size=20, max_new_tokens=16, dtype="fp16")
    straight, rows = steps_of(tmp_path / "a", "sd", **fast)
    assert [math.isfinite(r["grad_norm"]) for r in rows] == [False, True]
    calls.clear()
    steps_of(tmp_path / "b", "sd", last=1, **fast)
    state = torch.load(tmp_path / "b" / "checkpoint-1" / "state.pt", weights_only=True)
    assert state["scaler"]["scale"] == 65536 / 2 and not state["optimizer"]  # halved, and nothing was updated
    resumed, _ = steps_of(tmp_path / "b", "sd", resume=True, **fast)
    assert_same_rows(tmp_path / "b", tmp_path / "a")
    a, b, base = (m.state_dict() for m in (straight.lm.model, resumed.lm.model, tiny.model))
    assert all((a[n] == b[n]).all() for n in a) and any((a[n] != base[n]).any() for n in a)
    assert resumed.scaler.state_dict() == straight.scaler.state_dict() and resumed.scaler.get_scale() == 65536 / 2


CAMPAIGN = (
    "--recipe unisd-star --steps 8 --batch 4 --micro-batch 2 --save-every 1 --eval-size 1 --train-size 60 --max-new-tokens 12 "
    "--ema-every 2 --teacher-every 0 --sample-every 0 --device cpu --out"
).split()
KILLED = {  # kills, processes, flags; 54 in all
    "full": (26, 1, []),
    "lora": (14, 1, ["--lora-rank", "4"]),
    "two": (14, 2, []),
}


def one_process(argv, rank, size, port):
    """In a process of its own, one of `size`: what torchrun starts, without the seconds that importing torch takes."""
    if size > 1:
        os.environ |= dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1), os.dup2(sink, 2)
    torch.set_num_threads(1)
    watch.curves = lambda *_: None
    sys.exit(train.cli(argv))


def begin(out, size, *more):
    """The run's processes, started; what is there already goes on."""
    more += ("--resume",) * (out / "settings.json").exists()
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["train", "peft"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run = [forks.Process(target=one_process, args=([*CAMPAIGN, str(out), *more], rank, size, port)) for rank in range(size)]
    for process in run:
        process.start()
    return run


def end(run, seconds=120):
    """-> the exit codes. Who still waits for a lost one after so many seconds is ended, as torchrun would."""
    for process in run:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in run]


def being_written(out, since):
    """The checkpoint that a run has begun to write since then, and has not ended."""
    with contextlib.suppress(FileNotFoundError):
        return [folder for folder in out.glob(".writing*") if folder.stat().st_mtime > since]
    return []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a fork server")
@pytest.mark.parametrize("case", KILLED)
def test_killed_at_random_moments(tmp_path, case):
    """kill -9 a moment after a random step or, every other time, in the middle of writing a checkpoint; of two processes
    both or one. Whatever it hit, the run goes on and ends, bit for bit, where the run ends that was never killed.
    """
    kills, size, flags = KILLED[case]
    if case == "lora":
        pytest.importorskip("peft")
    dice = random.Random(seed := time.time_ns())
    assert end(begin(tmp_path / "straight", size, *flags)) == [0] * size
    killed, saving, finished = 0, 0, 0
    out = tmp_path / "0"
    while killed < kills:
        if (out / "settings.json").exists():
            with (out / "log.jsonl").open("a") as log:
                log.write('{"step": 6, "lo')  # a line that a kill cut short
        since, step = time.time(), steps_done(out) + dice.randrange(4)
        run = begin(out, size, *flags)
        while run[0].is_alive() and not (being_written(out, since) if killed % 2 else steps_done(out) >= step):
            time.sleep(0.001)
        time.sleep(dice.random() * (0.05 if killed % 2 else 0.3))
        for process in dice.choice([run, run[:1]] if killed % 2 else [run, run[-1:]]):  # the first one writes
            process.kill()
        codes = end(run, seconds=10)
        if codes == [0] * size:  # it was faster: compare, and begin another
            assert_same(out, tmp_path / "straight")
            finished += 1
            out = tmp_path / str(finished)
            continue
        assert -signal.SIGKILL in codes, (seed, codes)
        killed += 1
        saving += bool(being_written(out, since))
    assert end(begin(out, size, *flags)) == [0] * size, seed
    assert_same(out, tmp_path / "straight")
    assert not list(out.glob(".writing*"))
    print(f"{case}: {killed} killed, {saving} of them while a checkpoint was written; {finished + 1} runs compared")
    assert saving >= kills // 10


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, twenty):
    out = tmp_path / "o"
    process = start(out)
    wait_for(out, process, 4)
    process.send_signal(signal.SIGSTOP)  # alive, and for as long as it takes to try the folder from elsewhere
    second = start(out, "--resume")
    assert "another process is at work there" in second.communicate()[0] and second.returncode == 2
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate()
    assert process.returncode == 130 and f"python train.py --out {out} --resume" in text
    done = steps_done(out)
    assert 4 <= done < 20 and (out / f"checkpoint-{done}" / "state.pt").exists()
    process = start(out, "--resume")
    assert process.wait() == 0
    assert_same(out, twenty)


def dated(tmp_path):
    """A tiny model whose template shows today's date, and settings of a short run of it."""
    model = shutil.copytree(TINY, tmp_path / "m")
    template = "{{ strftime_now('%d %b %Y') }}" + (model / "chat_template.jinja").read_text(encoding="utf-8")
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    return dict(model=str(model), preset="tiny", steps=2, batch=2, micro_batch=2, eval_size=1, train_size=10, max_new_tokens=8)


def test_drift_is_measured_under_the_date_of_the_run(tmp_path):
    """The base is loaded a second time, after training: it must not be asked under another date, and then refused."""
    summary = train.main(make("sd", out=str(tmp_path / "o"), date="2020-01-02", **(dated(tmp_path) | dict(steps=1))))
    assert summary["after"]["jsd_to_base"] > 0


def test_a_run_that_is_resumed_on_another_day_asks_the_same(tmp_path, monkeypatch):
    """A template with today's date would show another one: settings.json keeps the day on which the run began."""

    class Later(config.date):
        @classmethod
        def today(cls):
            return cls(2031, 3, 4)

    settings = dated(tmp_path)
    run, _ = steps_of(tmp_path / "o", "sd", last=1, **settings)
    today = str(config.date.today())
    checkpoint.write_json(tmp_path / "o" / "settings.json", vars(run.cfg))
    monkeypatch.setattr(config, "date", Later)
    again, _ = steps_of(tmp_path / "o", "sd", resume=True, **settings)
    assert run.cfg.date == again.cfg.date == today and run.prompts == again.prompts
    fresh, _ = steps_of(tmp_path / "new", "sd", last=1, **settings)
    assert fresh.cfg.date == "2031-03-04" and fresh.prompts[0] != run.prompts[0]
    asked = "04 Mar 2031" in fresh.lm.tokenizer.decode(fresh.prompts[0]["student"])
    assert asked and "2031" not in run.lm.tokenizer.decode(run.prompts[0]["teacher"])
