"""The instruments measure what they say, and every section runs and writes its numbers down."""

import json

import pytest
import torch

from engine.config import Config
from engine.sampling import FINISHED
from experiments import bench
from experiments.bench_loss import loss_problem, medians, ours, peak_bytes, plain
from experiments.bench_model import NAMES

CPU = torch.device("cpu")


def test_the_peak_is_counted_by_hand():
    x = torch.zeros(1000)

    def work():
        a = x + 1  # 4000 bytes
        b = a + 1  # 8000 together
        del a
        return (b + 1).sum()  # 8000 again: a is gone

    assert peak_bytes(work, CPU, [x]) in (8000, 8004)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("agreement", ["none", "token"])
def test_both_contenders_compute_the_same(divergence, agreement):
    m = Config(divergence=divergence, agreement=agreement, gamma=1.0, chunk=7)
    found = []
    for f in (ours, plain):
        p = loss_problem(40, 60, 8, CPU)
        f(p, m)
        found.append((p["student"].grad, p["weight"].grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward", *(pytest.param(d, marks=pytest.mark.slow) for d in ("reverse", "jsd"))])
def test_the_loss_stays_below_one_tensor_of_logits_and_does_not_grow_with_the_answers(divergence):
    """The promise at V = 151,936 and N = 512, at a size that is quick: the chunk is the same share of N."""
    v, h = 2000, 16
    m = Config(divergence=divergence, agreement="token", gamma=1.0, log_entropy=False, chunk=0)

    def extra(n):
        p = loss_problem(n, v, h, CPU)
        work = lambda: ours(p, m)
        from engine import head

        sizes, head.tokens_per_chunk = head.tokens_per_chunk, lambda *_: (256, 128, 8)
        try:
            return peak_bytes(work, CPU, [x for x in p.values() if isinstance(x, torch.Tensor)]) - 4 * (n * h + v * h)
        finally:
            head.tokens_per_chunk = sizes

    assert extra(512) <= 4 * 512 * v
    assert abs(extra(1024) - extra(512)) < 0.1 * 4 * 512 * v


def test_medians_take_turns():
    order = []
    medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, CPU)
    assert order == ["a", "b"] * 3


QUICK = "--repeats 1 --tokens 64 --vocab 500 --prompts 8 --device cpu --threads 1".split()


def measured(folder, *sections):
    file = folder / "deep" / "numbers.json"
    assert bench.main([*QUICK, "--json", str(file), "--sections", *sections]) == 0
    found = json.loads(file.read_text())
    assert set(found) == {"where", *sections} and found["where"]["device"].startswith("CPU")
    return found


def test_loss_and_sampling_run_and_write_their_numbers(tmp_path):
    found = measured(tmp_path, "loss", "sampling")
    ours_ = {r["loss"]: r for r in found["loss"] if r["who"] == "ours"}
    assert set(ours_) >= {"forward", "reverse", "jsd", "forward, K = 3"}
    leave, whole = found["sampling"]
    assert leave["greedy tokens equal"] and whole["greedy tokens equal"]
    assert leave["wasted positions"] <= FINISHED < whole["wasted positions"]


@pytest.mark.slow
def test_the_other_sections_run_and_write_their_numbers(tmp_path):
    others = [s for s in bench.SECTIONS if s not in ("loss", "sampling")]
    found = measured(tmp_path, *others)
    assert others == ["scoring", "steps", "model"]
    assert {r["recipe"] for r in found["steps"]} == set(NAMES)
    assert next(r for r in found["steps"] if r["recipe"] == "sft")["time / sft"] == 1.0
    assert all(r["update MFU"] == "not measured" for r in found["model"])  # a CPU has no entry in PEAK
