"""Intervals, paired differences, perplexities, drift and the cache of answers."""

import math

import pytest
import torch
from torch.testing import assert_close

import losses
from engine import metrics
from engine.loading import load
from tasks import world
from tasks.data import chat_ids

CPU = torch.device("cpu")


def test_wilson_by_hand():
    # 8 of 10, z = 1.96: middle (.8 + 3.8416/20) / 1.38416 = .71673; half 1.96 sqrt(.016 + .009604) / 1.38416 = .22658
    low, high = metrics.wilson(8, 10)
    assert low == pytest.approx(49.02, abs=0.02) and high == pytest.approx(94.33, abs=0.02)
    assert metrics.wilson(0, 10)[0] == 0 and metrics.wilson(10, 10)[1] == 100 and metrics.wilson(0, 0) == (0, 100)


def test_drift_of_a_model_from_itself_is_zero_and_grows_with_noise(tiny):
    task, base = world.load(5, 4), tiny
    same = metrics.drift(load("tiny", CPU), base, task, task.test)
    assert same["jsd_to_base"] == pytest.approx(0, abs=1e-6) and same["retention_ppl"] == pytest.approx(same["reverse_ppl"])
    noisy = load("tiny", CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in noisy.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    moved = metrics.drift(noisy, base, task, task.test)
    assert 0 < moved["jsd_to_base"] <= losses.LN2
    assert moved["reverse_ppl"] > same["reverse_ppl"]


def test_perplexity_and_jsd_equal_the_plain_formulas(tiny, monkeypatch):
    a, b = tiny, load("tiny", CPU)
    with torch.no_grad():
        b.model.model.norm.weight.mul_(0.8)
    prompts = [chat_ids(a.tokenizer, "47+38"), chat_ids(a.tokenizer, "where is lamp: mill A, cave B, port C")]
    answers = [a.tokenizer(t)["input_ids"] for t in ("7+8=15 4+3+1=8 so 85", "lamp in cave B")]
    width = max(map(len, answers))
    ids = torch.tensor([x + [0] * (width - len(x)) for x in answers])
    mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in answers])
    ppl, jsds = [], []
    for p, y in zip(prompts, answers, strict=True):
        with torch.no_grad():
            la, lb = (m.model(input_ids=torch.tensor([p + y])).logits[0, len(p) - 1 : -1].log_softmax(-1) for m in (a, b))
        ppl.append(losses.token_logps(la, torch.tensor(y)))
        jsds.append(losses.jsd(la, lb, 0.5))
    monkeypatch.setattr(metrics, "CHUNK", 3)
    monkeypatch.setattr(metrics, "BUDGET", 10)
    assert metrics.perplexity(a, prompts, ids, mask) == pytest.approx(math.exp(-torch.cat(ppl).mean()), rel=1e-5)
    assert metrics.token_jsd(a, b, prompts, ids, mask) == pytest.approx(torch.cat(jsds).mean().item(), rel=1e-4)


def test_ended(tiny):
    lm = tiny
    end = lm.eos[0]
    ids, mask = torch.tensor([[5, end, 7], [5, 6, 7]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert metrics.ended(lm, ids, mask).tolist() == [True, False]


def test_another_tokenizer_as_base_is_refused(tiny):
    a, b = tiny, load("tiny", CPU)
    b.vocab += 1
    task = world.load(5, 1)
    with pytest.raises(ValueError, match="another tokenizer"):
        metrics.drift(a, b, task, task.test)


def test_table():
    column = {"by_task": {"sum": 50.0}, "interval": {"sum": (40.2, 59.8)}, "accuracy": 50.0}
    assert metrics.table({"x": column}).splitlines()[2] == "| sum |  50.0 [40, 60] |"
    assert_close(float(metrics.table({"x": column}).splitlines()[-1].split("**")[3]), 50.0)


def test_paired_differences_by_hand():
    # differences 1, 0, -1, 1: mean .25, sd .957, half 1.96 * .957 / 2 = .938
    p = metrics.paired([True, True, False, True], [False, True, True, False])
    assert p["difference"] == 25.0 and (p["wins"], p["losses"]) == (2, 1)
    assert p["interval"] == pytest.approx([25 - 93.8, 25 + 93.8], abs=0.1)
    assert metrics.paired([True] * 9, [True] * 9)["interval"] == [0.0, 0.0]
    with pytest.raises(ValueError):
        metrics.paired([True], [True, False])


def test_entropy_and_gold_perplexity_equal_the_plain_formulas(tiny):
    lm, task = tiny, world.load(5, 1)
    nll, entropies = [], []
    for e in task.test:
        prompt = chat_ids(lm.tokenizer, e.question)
        gold = lm.tokenizer(e.target)["input_ids"] + [lm.eos[0]]
        with torch.no_grad():
            logps = lm.model(input_ids=torch.tensor([prompt + gold])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        nll.append(-losses.token_logps(logps, torch.tensor(gold)))
        entropies.append((prompt, gold, losses.entropy(logps)))
    assert metrics.gold_ppl(lm, task, task.test) == pytest.approx(math.exp(torch.cat(nll).mean()), rel=1e-4)
    prompt, gold, expected = entropies[0]
    found = metrics.mean_entropy(lm, [prompt], torch.tensor([gold]), torch.ones(1, len(gold), dtype=torch.long))
    assert found == pytest.approx(expected.mean().item(), rel=1e-4)


def test_answers_are_cached_for_these_weights_and_settings_only(tmp_path, monkeypatch):
    lm = load("tiny", CPU)
    prompts = [chat_ids(lm.tokenizer, "47+38")]
    first = metrics.answers(lm, prompts, 20, tmp_path)
    real, calls = metrics.generate, []
    monkeypatch.setattr(metrics, "generate", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    again = metrics.answers(lm, prompts, 20, tmp_path)
    assert not calls and all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    metrics.answers(lm, prompts, 21, tmp_path)
    metrics.answers(lm, [prompts[0] + [5]], 20, tmp_path)
    with torch.no_grad():
        lm.model.model.norm.weight[0] += 1e-3  # the next checkpoint of the same run
    metrics.answers(lm, prompts, 20, tmp_path)
    assert len(calls) == 3
    version = lm.model.model.norm.weight._version
    lm.model.model.norm.weight.data[0] += 1e-3  # a write that torch does not count, as those of the fused AdamW on CUDA
    assert lm.model.model.norm.weight._version == version
    metrics.answers(lm, prompts, 20, tmp_path)
    assert len(calls) == 4


def test_answers_that_cannot_be_kept_are_answers_all_the_same(tmp_path, monkeypatch, tiny):
    prompts = [chat_ids(tiny.tokenizer, text) for text in ("12+34", "where is toad: mill, cave, port, barn")]
    found = metrics.answers(tiny, prompts, 12, tmp_path / "kept")
    (file,) = (tmp_path / "kept").iterdir()
    assert all((a == b).all() for a, b in zip(metrics.answers(tiny, prompts, 12, tmp_path / "kept"), found, strict=True))

    def half(x, path):
        path.write_bytes(file.read_bytes()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.torch, "save", half)
    again = metrics.answers(tiny, prompts, 12, tmp_path / "full")
    assert all((a == b).all() for a, b in zip(again, found, strict=True))
    assert not list((tmp_path / "full").glob("*.pt"))  # half a file is never taken for answers
