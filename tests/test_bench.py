"""The instruments measure what they say, and every section runs and writes its numbers down."""

import json
import weakref

import pytest
import torch

from engine.config import Config
from experiments import bench
from experiments.bench import NAMES, bench_model, loss_problem, medians, once, ours, peak_bytes, plain

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


def test_a_contender_leaves_no_gradient_behind():
    p = loss_problem(8, 20, 4, CPU)
    once(plain, p, Config())
    assert p["student"].grad is None and p["weight"].grad is None


def test_a_model_of_a_real_shape_is_measured_under_the_recipes_that_were_asked_for():
    """And the memory of a run is free before the next one is made."""
    alive = []

    def shaped(name, device, make=bench.shaped_run):
        assert not [model for model in alive if model() is not None]
        run = make(name, device)
        alive.append(weakref.ref(run.lm.model))
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "shaped_run", shaped)
        rows = list(bench_model(CPU, ["sd", "unisd-star, budget 0.25"], repeats=1))
    assert [row["recipe"] for row in rows] == ["sd", "unisd-star, budget 0.25"]
    for row in rows:
        assert row["time / sft"] == "–" and row["ms"] > 0  # no sft to compare with
        assert row["update MFU"] == "not measured"  # a CPU has no entry in PEAK
        assert abs(sum(row[f"{part} %"] for part in bench.PARTS) - 100) <= 1


def test_a_table_and_the_time_beside_sft():
    rows = [{"recipe": name, "time / sft": "–", "ms": ms} for name, ms in (("sd", 30.0), ("sft", 20.0))]
    assert bench.markdown(bench.beside_sft(rows)).splitlines()[2:] == ["| sd | 1.5 | 30.0 |", "| sft | 1.0 | 20.0 |"]


def measured(folder, *sections):
    file = folder / "deep" / "numbers.json"
    quick = "--repeats 1 --tokens 64 --vocab 500 --device cpu --threads 1".split()
    assert bench.main([*quick, "--json", str(file), "--sections", *sections]) == 0
    found = json.loads(file.read_text())
    assert set(found) == {"where", *sections} and found["where"]["device"].startswith("CPU")
    return found


def test_the_loss_runs_and_writes_its_numbers(tmp_path):
    rows = measured(tmp_path, "loss")["loss"]
    assert {r["loss"] for r in rows if r["who"] == "ours"} >= {"forward", "reverse", "jsd", "forward, K = 3"}
    assert all(r["time / plain"] == 1.0 for r in rows if r["who"] == "plain")


@pytest.mark.slow
def test_the_other_sections_run_and_write_their_numbers(tmp_path):
    found = measured(tmp_path, "steps", "model")
    assert list(bench.SECTIONS) == ["loss", "steps", "model"]
    assert {r["recipe"] for r in found["steps"]} == set(NAMES) > {r["recipe"] for r in found["model"]} == set(bench.MODEL)
    for rows in (found["steps"], found["model"]):
        assert next(r for r in rows if r["recipe"] == "sft")["time / sft"] == 1.0
