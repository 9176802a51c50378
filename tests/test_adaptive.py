"""Contexts for the least certain answers only, and the divergence before the update."""

from dataclasses import replace

import pytest
import torch
from conftest import VOCAB
from test_unisd import batch_of, scored
from torch.testing import assert_close

import losses
import train
from engine.adaptive import divergence_before, least_certain
from engine.config import Config
from engine.head import head_of


def before_of(model, m, batch=None):
    step = scored(model, batch or batch_of(), m)
    return divergence_before(step.reader, step.scores, m)


def test_the_divergence_before_the_update_is_what_the_loss_sees(model):
    batch, m = batch_of(), Config(chunk=3)
    before = before_of(model, m)
    _, each = scored(model, batch, m).loss(model, m)
    assert_close(before[batch.mask.bool()], each["div"].detach(), rtol=1e-12, atol=1e-12)


def test_no_gradient_is_computed_where_none_is_wanted(model, monkeypatch):
    """A custom autograd function is asked for gradients by its inputs, whatever no_grad says; the quantile pass must
    not pay for one.
    """
    step = scored(model, batch_of(), Config())
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient was taken"))
    divergence_before(step.reader, step.scores, Config())


def budgeted(model, m, batch=None):
    return scored(model, batch or batch_of(), m).weights


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_full_budget_is_plain_agreement_in_one_stream_or_two(model, level, monkeypatch):
    """Budget 1 shares its passes with the teacher; a budget just below 1 that still takes everyone does not."""
    m = Config(agreement=level, gamma=2.0)
    whole = budgeted(model, m)
    almost = budgeted(model, replace(m, agreement_budget=0.999))  # rounded up: all four
    assert_close(whole.reliability, almost.reliability)
    assert_close(whole.share, almost.share)
    assert whole.reliability.min() < 1


def test_the_others_keep_weight_one_and_the_most_uncertain_are_taken(model):
    batch = batch_of((4, 7, 3, 5))
    m = Config(agreement="token", gamma=5.0, agreement_budget=0.5)
    step = scored(model, batch, m)
    entropies = losses.entropy(head_of(model, VOCAB)(step.scores.states))
    each = torch.zeros(batch.mask.shape, dtype=entropies.dtype).masked_scatter(batch.mask.bool(), entropies)
    mean = each.sum(1) / batch.mask.sum(1)
    taken = mean.topk(2).indices.tolist()
    for b in range(4):
        assert (step.weights.reliability[b] == 1).all().item() == (b not in taken)
    rows = []
    model.model.register_forward_hook(lambda _, args, kwargs, out: rows.append(len(out[0])), with_kwargs=True)
    budgeted(model, m, batch)
    assert sum(rows) == 4 + 2 * len(batch.contexts)  # the teacher for all, the contexts for half


def test_uncertainty_by_divergence_is_the_divergence_that_the_loss_sees(model):
    batch = batch_of((4, 7, 3, 5))
    m = Config(agreement="token", gamma=5.0, agreement_budget=0.25, uncertainty="divergence")
    w, now = budgeted(model, m, batch).reliability, before_of(model, m, batch)
    most = ((now * batch.mask).sum(1) / batch.mask.sum(1)).argmax().item()
    assert [b for b in range(4) if (w[b] != 1).any()] == [most]


def test_the_random_control_takes_the_same_number_and_repeats_itself(model):
    m = Config(agreement="token", gamma=5.0, agreement_budget=0.25, uncertainty="random")
    a, b = (budgeted(model, m).reliability for _ in range(2))
    assert a.equal(b) and (a != 1).any(1).sum() == 1


def test_a_budget_of_zero_reads_no_context(model):
    rows = []
    model.model.register_forward_hook(lambda _, args, kwargs, out: rows.append(len(out[0])), with_kwargs=True)
    w = budgeted(model, Config(agreement="token", gamma=5.0, agreement_budget=0.0)).reliability
    assert sum(rows) == len(w) and (w == 1).all()


def test_entropy_is_measured_only_if_it_is_logged(model):
    step = scored(model, batch_of(), Config())
    with_it, a = step.loss(model, Config())
    without, b = step.loss(model, Config(log_entropy=False))
    assert with_it == without and set(a) - set(b) == {"entropy"}


def test_all_masked_is_one_clear_error(model):
    batch = replace(batch_of(), mask=torch.zeros(4, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="every token is masked"):
        scored(model, batch, Config())


def test_the_random_control_does_not_look_at_padding(model):
    m = Config(agreement="token", gamma=5.0, agreement_budget=0.25, uncertainty="random")
    a, b = batch_of(), batch_of()
    b.ids = torch.where(b.mask.bool(), b.ids, b.ids + 7)
    assert budgeted(model, m, a).reliability.equal(budgeted(model, m, b).reliability)


def test_the_divergence_before_the_update_is_computed_once(model, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "divergence_before", lambda *a: calls.append(1) or divergence_before(*a))
    m = Config(agreement="token", agreement_budget=0.5, uncertainty="divergence", clip_quantile=0.9)
    assert scored(model, batch_of(), m).tokens.ceiling > 0 and len(calls) == 1


def test_sequences_are_ranked_as_precisely_as_they_are_measured():
    each = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)  # equal in fp32
    assert least_certain(each, 0.5) == [1] and least_certain(each.flip(0), 0.5) == [0]
    assert least_certain(torch.tensor([3.0, 1.0, 2.0]), 0.4) == [0, 2]  # 1.2 of 3 sequences: always rounded up
