"""Two processes do what one does: same losses, same weights; one's checkpoint is the other's; a lost one is told of."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import train
from engine import build
from engine.config import make, parse
from engine.parallel import ALONE, Ranks, clip_gradients

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--steps 5 --batch 8 --micro-batch 2 --train-size 60 --eval-size 1 --teacher-every 0 --sample-every 0 "
    "--ema-every 2 --device cpu"
).split()
ENV = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCH_DISTRIBUTED_DEBUG": "OFF"}


# train.py in float64. In fp32 two orders of summing end 1e-5 apart, because Adam divides the smallest gradients by their own
# size, and a slightly wrong denominator could hide behind so wide a tolerance.
DRIVER = """import sys
import torch
import train
from engine import build, checkpoint

load, save, stop = build.load, checkpoint.save, {stop}
build.load = lambda name, device, dtype: load(name, device, torch.float64)


def save_and_stop(run):
    save(run)
    if run.step == stop:
        raise KeyboardInterrupt


checkpoint.save = save_and_stop
code = train.cli(sys.argv[1:])
sys.exit(code if stop is None else code != 130)
"""


def command(processes, out, *more, stop=None):
    start = [sys.executable]
    if processes > 1:  # --standalone: a free port, so that several runs can go on beside each other
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = out.parent / f"train_{stop}_{out.name}.py"
    script.write_text(DRIVER.format(stop=stop))
    return [*start, str(script), *FLAGS, "--out", str(out), *more]


def run(processes, out, *more, stop=None):
    """`stop`: as if it had been stopped after so many steps: its last checkpoint is there, its summary is not."""
    line = command(processes, out, *more, stop=stop)
    done = subprocess.run(line, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out):
    return load_file(out / "model.safetensors")


def nearly_equal(a, b, tolerance=1e-12):
    for x, y in zip(log(a), log(b), strict=True):
        for key in ("loss", "div", "weight", "length", "eos", "nll", "entropy"):
            assert abs(x.get(key, 0.0) - y.get(key, 0.0)) < tolerance, (x["step"], key, x[key], y[key])
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(ours[name], theirs[name], atol=tolerance, rtol=0.0)


EVERYTHING = ["--clip-quantile", "0.9", "--agreement-budget", "0.5"]
MODES = {  # name -> processes, flags
    "one": (1, EVERYTHING),
    "two": (2, EVERYTHING),
    "sharded": (2, [*EVERYTHING, "--shard"]),
    "two-sft": (2, ["--recipe", "sft"]),
    "one-sft": (1, ["--recipe", "sft"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All of MODES, two at a time. Workers of pytest-xdist share them: the first makes the folder, the others wait for "done"."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "parallel"
    try:
        folder.mkdir()
    except FileExistsError:
        while not (folder / "done").exists():
            time.sleep(0.2)
        return folder
    try:
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(run, n, folder / name, *flags) for name, (n, flags) in MODES.items()]:
                done.result()
    finally:
        (folder / "done").touch()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("a", "b"), [("one", "two"), ("one", "sharded"), ("one-sft", "two-sft")])
def test_two_processes_equal_one(runs, a, b):
    """On-policy too, with quantiles, a budget and an EMA that moves: everything a step must know as a whole."""
    nearly_equal(runs / a, runs / b)


@pytest.mark.slow
def test_one_process_writes_and_prints(runs):
    assert sorted(p.name for p in (runs / "two").iterdir()) == sorted(p.name for p in (runs / "one").iterdir())
    summaries = [json.loads((runs / n / "summary.json").read_text()) for n in ("one", "two", "sharded")]
    for s in summaries[1:]:
        assert s["after"]["accuracy"] == summaries[0]["after"]["accuracy"]
        assert abs(s["after"]["jsd_to_base"] - summaries[0]["after"]["jsd_to_base"]) < 1e-12


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def killed_after(out, rows, *more):
    """A run of two processes, one of which is killed once the log has that many rows. -> exit code, seconds, its stderr."""
    both = subprocess.Popen(
        command(2, out, "--save-every", "1", *more), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 200
    while not ((out / "log.jsonl").exists() and len(log_lines(out)) >= rows):
        assert both.poll() is None and time.time() < deadline, both.stderr.read()
        time.sleep(0.05)
    victim = max(children(both.pid), key=lambda p: f"\0RANK={1}\0" in Path(f"/proc/{p}/environ").read_text())
    os.kill(victim, signal.SIGKILL)
    begun = time.time()
    _, told = both.communicate(timeout=120)
    return both.returncode, time.time() - begun, told


def log_lines(out):
    return [x for x in (out / "log.jsonl").read_text().splitlines() if x.endswith("}")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to find the process to kill")
def test_a_lost_process_ends_the_run_and_another_number_goes_on(runs, tmp_path):
    code, seconds, told = killed_after(tmp_path / "lost", 3, *EVERYTHING)
    assert code != 0 and seconds < 60
    assert "another process of this run ended" in told and "--resume" in told
    run(1, tmp_path / "lost", "--save-every", "1", "--resume")  # written by two, continued by one
    nearly_equal(runs / "one", tmp_path / "lost")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then", "like", "exact"),
    [
        (1, 2, "one", False),
        (2, 2, "two", True),
        pytest.param("sharded", "sharded", "sharded", True, id="sharded"),
        pytest.param("sharded", 1, "one", False, id="sharded-one"),
    ],
)
def test_a_checkpoint_goes_on_under_any_number_of_processes(runs, tmp_path, first, then, like, exact):
    shard = lambda mode: ["--shard"] if mode == "sharded" else ["--no-shard"]
    count = lambda mode: 2 if mode == "sharded" else mode
    run(count(first), tmp_path / "r", "--save-every", "1", *EVERYTHING, *shard(first), stop=3)
    run(count(then), tmp_path / "r", "--save-every", "1", *EVERYTHING, *shard(then), "--resume")
    nearly_equal(runs / like, tmp_path / "r", **({"tolerance": 1e-30} if exact else {}))


@pytest.mark.slow
def test_torchrun_says_what_cannot_be_shared(tmp_path):
    done = subprocess.run(command(2, tmp_path / "unused", "--batch", "9"), env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "--batch 9 must be a multiple of the number of processes (2)" in done.stderr


def test_what_cannot_be_shared_is_refused(monkeypatch):
    two = object.__new__(Ranks)
    two.rank, two.size = 0, 2
    monkeypatch.setattr(build.parallel, "ranks", lambda: two)
    with pytest.raises(ValueError, match=r"--batch 9 must be a multiple of the number of processes \(2\)"):
        build.place(make("sd", batch=9, device="cpu"))
    assert build.place(make("sd", batch=10, device="cpu"))[1].share(10) == slice(0, 5)
    with pytest.raises(ValueError, match="--shard and --lora-rank"):
        make("sd", shard=True, lora_rank=4)


def test_shard_alone_says_how_to_start_it(tmp_path, capsys):
    assert train.cli([*FLAGS, "--out", str(tmp_path / "x"), "--shard"]) == 2
    assert "torchrun" in capsys.readouterr().err
    assert parse(["--shard"]).shard


@pytest.mark.parametrize("limit", [0.0, 1.0, 9.0])
@pytest.mark.parametrize("given", [0, 1, 2])
def test_alone_gradients_are_clipped_as_torch_does(given, limit):
    """Whatever has a gradient: all, some or none of the parameters. A limit of 0 is none."""
    ours, theirs = ([torch.nn.Parameter(torch.zeros(2)) for _ in range(2)] for _ in range(2))
    for some in (ours, theirs):
        for p, values in zip(some[:given], ([3.0, 0.0], [0.0, 4.0]), strict=False):
            p.grad = torch.tensor(values)
    assert clip_gradients(ours, limit) == torch.nn.utils.clip_grad_norm_(theirs, limit or float("inf")) == (0, 3, 5)[given]
    assert all(a.grad is b.grad is None or torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


def test_alone_everything_is_the_identity():
    x = torch.arange(6.0).reshape(2, 3)
    assert ALONE.gather(x) is x and ALONE.mine(x, x) is x and ALONE.total(x) is x
    assert ALONE.share(7) == slice(0, 7) and ALONE.objects(3) == [3] and ALONE.any(True) and not ALONE.any(False)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_are_disjoint_and_complete(size):
    rows = []
    for rank in range(size):
        one = object.__new__(Ranks)
        one.rank, one.size = rank, size
        rows += list(range(17))[one.share(17)]
    assert rows == list(range(17))
