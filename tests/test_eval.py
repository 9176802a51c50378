"""Intervals, drift and the command line of eval.py."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

import eval as evaluation
import losses
import world
from data import chat_ids
from rollout import TINY, load

CPU = torch.device("cpu")


def test_wilson_by_hand():
    # 8 of 10, z = 1.96: middle (.8 + 3.8416/20) / 1.38416 = .71673; half 1.96 sqrt(.016 + .009604) / 1.38416 = .22658
    low, high = evaluation.wilson(8, 10)
    assert low == pytest.approx(49.02, abs=0.02) and high == pytest.approx(94.33, abs=0.02)
    assert (
        evaluation.wilson(0, 10)[0] == 0 and evaluation.wilson(10, 10)[1] == 100 and evaluation.wilson(0, 0) == (0, 100)
    )


def test_drift_of_a_model_from_itself_is_zero_and_grows_with_noise():
    task, base = world.load(100, 4), load("tiny", CPU)
    same = evaluation.drift(load("tiny", CPU), base, task, task.test)
    assert same["jsd_to_base"] == pytest.approx(0, abs=1e-6) and same["retention_ppl"] == pytest.approx(
        same["reverse_ppl"]
    )
    noisy = load("tiny", CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in noisy.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    moved = evaluation.drift(noisy, base, task, task.test)
    assert 0 < moved["jsd_to_base"] <= losses.LN2
    assert moved["reverse_ppl"] > same["reverse_ppl"]


def test_perplexity_and_jsd_equal_the_plain_formulas():
    a, b = load("tiny", CPU), load("tiny", CPU)
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
            la, lb = (
                m.model(input_ids=torch.tensor([p + y])).logits[0, len(p) - 1 : -1].log_softmax(-1) for m in (a, b)
            )
        ppl.append(math.exp(-losses.token_logps(la, torch.tensor(y)).mean()))
        jsds.append(losses.jsd(la, lb, 0.5))
    assert evaluation.perplexity(a, prompts, ids, mask, 3, 10) == pytest.approx(sum(ppl) / 2, rel=1e-5)
    assert evaluation.token_jsd(a, b, prompts, ids, mask, 3, 10) == pytest.approx(
        torch.cat(jsds).mean().item(), rel=1e-4
    )


def test_ended():
    lm = load("tiny", CPU)
    end = lm.eos[0]
    ids, mask = torch.tensor([[5, end, 7], [5, 6, 7]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert evaluation.ended(lm, ids, mask).tolist() == [True, False]


def test_the_command(tmp_path, capsys):
    out = tmp_path / "report"
    assert (
        evaluation.main(["--model", str(TINY), "--base", "tiny", "--size", "3", "--device", "cpu", "--out", str(out)])
        == 0
    )
    text = capsys.readouterr().out
    assert "| family | alone | with reference |" in text and "jsd_to_base 0.0000" in text
    assert json.loads((out / "eval.json").read_text())["alone"]["n"] == 15
    assert evaluation.main(["--model", "no/such", "--device", "cpu"]) == 2
    assert "no/such" in capsys.readouterr().err


def test_another_tokenizer_as_base_is_refused():
    a, b = load("tiny", CPU), load("tiny", CPU)
    b.vocab += 1
    task = world.load(100, 1)
    with pytest.raises(ValueError, match="another tokenizer"):
        evaluation.drift(a, b, task, task.test)


def test_table():
    column = {"by_task": {"sum": 50.0}, "interval": {"sum": (40.2, 59.8)}, "accuracy": 50.0}
    assert evaluation.table({"x": column}).splitlines()[2] == "| sum |  50.0 [40, 60] |"
    assert_close(float(evaluation.table({"x": column}).splitlines()[-1].split("**")[3]), 50.0)
