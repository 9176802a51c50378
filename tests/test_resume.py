"""N steps = k steps, a real kill -9, and --resume: the same log and the same weights, bit for bit, wherever the kill
falls.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "--recipe unisd-star --steps 20 --batch 6 --micro-batch 3 --eval-size 2 --train-size 100 --ema-every 2 "
    "--save-every 3 --teacher-every 5 --device cpu --sample-every 0"
).split()


def start(out, *more):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "train.py", *SETTINGS, "--out", str(out), *more]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps_done(out):
    log = Path(out) / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def result(out):
    """The log without wall-clock seconds, and the weights."""
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("s_")} for r in rows], AutoModelForCausalLM.from_pretrained(
        out
    ).state_dict()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "o"
    process = start(out)
    assert process.wait() == 0, process.stdout.read()
    return result(out)


def assert_same(out, straight):
    rows, weights = result(out)
    pairs = zip(rows, straight[0], strict=True)
    assert not [(a["step"], k, a.get(k), b.get(k)) for a, b in pairs for k in a.keys() | b.keys() if a.get(k) != b.get(k)]
    assert all((weights[n] == straight[1][n]).all() for n in weights)


def wait_for(out, process, steps):
    while steps_done(out) < steps and process.poll() is None:
        time.sleep(0.01)


def test_killed_once_and_resumed_it_is_the_run_that_was_never_killed(tmp_path, straight):
    """A real SIGKILL, somewhere after the first checkpoint; the quick one of its kind."""
    process = start(tmp_path / "o")
    wait_for(tmp_path / "o", process, 8)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert steps_done(tmp_path / "o") < 20
    process = start(tmp_path / "o", "--resume")
    assert process.wait() == 0, process.stdout.read()
    assert_same(tmp_path / "o", straight)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, straight):
    """Three kills at random steps plus a random delay: in sampling, in the update, or in the middle of writing a
    checkpoint.
    """
    out, dice, more = tmp_path / "o", random.Random(time.time_ns()), []
    for low in (1, 5, 10):
        process, at = start(out, *more), low + dice.randrange(4)
        wait_for(out, process, at)
        time.sleep(dice.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        process.wait()
        more = ["--resume"]
        with (out / "log.jsonl").open("a") as log:
            log.write('{"step": 6, "lo')  # a line that a kill cut short ...
        (out / ".writing-6").mkdir(exist_ok=True)  # ... and a checkpoint that it left half written
    process = start(out, *more)
    assert process.wait() == 0, process.stdout.read()
    assert_same(out, straight)
    assert not list(out.glob(".writing*"))


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, straight):
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
    assert_same(out, straight)
