"""Agreement weights: by hand, and the properties that the official form does not have."""

import math

import pytest
import torch
from torch.testing import assert_close

from agreement import coefficients, disagreement, sequence_weights, token_weights, weighted_mean

MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
#                      K = 2 readings of B = 2 sequences; the last token of the second is masked and holds rubbish
READINGS = torch.tensor([[[-1.0, -2.0, -3.0], [-1.0, -1.0, 7.0]], [[-1.0, -4.0, -3.5], [-3.0, -1.0, -torch.inf]]])


def test_token_disagreement_by_hand():
    # unbiased variance of two numbers = (difference)^2 / 2
    assert_close(disagreement(READINGS, MASK, "token", "var"), torch.tensor([[0.0, 2.0, 0.125], [2.0, 0.0, 0.0]]))
    assert_close(disagreement(READINGS, MASK, "token", "range"), torch.tensor([[0.0, 2.0, 0.5], [2.0, 0.0, 0.0]]))


def test_sequence_disagreement_by_hand():
    # L^k: (-2, -17/6) and (-1, -2); biased variance of two numbers = (difference / 2)^2
    assert_close(disagreement(READINGS, MASK, "sequence", "var"), torch.tensor([(5 / 12) ** 2, 0.25]))
    assert_close(disagreement(READINGS, MASK, "sequence", "range"), torch.tensor([5 / 6, 1.0]))


def test_probabilities_disagree_less_about_what_all_reject():
    """1e-9 against 1e-6 differs by 6.9 nats, and by nothing that matters; .9 against .3 differs by .6."""
    readings, mask = torch.tensor([[[1e-9, 0.9]], [[1e-6, 0.3]]], dtype=torch.float64).log(), torch.ones(1, 2)
    assert_close(disagreement(readings, mask, "token", "prob"), torch.tensor([[(1e-6 - 1e-9) ** 2 / 2, 0.6**2 / 2]]).double())
    rejected, disputed = disagreement(readings, mask, "token", "var")[0]
    assert rejected > 30 * disputed
    # sequence: geometric means (1e-9 * .9) ** .5 and (1e-6 * .3) ** .5; the variance of two is (difference / 2) ** 2
    means = [(1e-9 * 0.9) ** 0.5, (1e-6 * 0.3) ** 0.5]
    assert disagreement(readings, mask, "sequence", "prob").item() == pytest.approx(((means[1] - means[0]) / 2) ** 2)
    with pytest.raises(ValueError, match="at least 2 contexts"):
        disagreement(readings[:1], mask, "token", "prob")


def test_token_weights_by_hand():
    delta = torch.tensor([[0.0, 2.0, 1.0], [4.0, 100.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    # unmasked 0, 1, 2, 4; quantile .5 -> 1.5;   w = 1 / (1 + 2 d / 1.5)
    expected = torch.tensor([[1.0, 1 / (1 + 4 / 1.5), 1 / (1 + 2 / 1.5)], [1 / (1 + 8 / 1.5), 1.0, 1.0]])
    assert_close(token_weights(delta, mask, 2.0, quantile=0.5), expected)
    # cap: 4 / 1.5 is cut to 2, so w = 1 / (1 + 2 * 2) = .2;  floor: gamma 1e9 ends at the floor
    assert token_weights(delta, mask, 2.0, quantile=0.5, cap=2.0)[1, 0].item() == pytest.approx(0.2)
    assert token_weights(delta, mask, 1e9, quantile=0.5)[1, 0].item() == pytest.approx(0.01)


def test_the_default_quantile_interpolates_linearly_at_95_per_cent():
    delta = torch.arange(21.0).unsqueeze(0)  # quantile .95 of 0..20 is 19
    assert token_weights(delta, torch.ones_like(delta), 1.0)[0, 19].item() == pytest.approx(0.5)


def test_agreeing_teachers_weigh_nothing_down():
    same = READINGS[:1].repeat(3, 1, 1).nan_to_num()
    assert (token_weights(disagreement(same, MASK, "token", "var"), MASK, 1.0) == 1).all()
    assert (sequence_weights(disagreement(same, MASK, "sequence", "range"), 1.0) == 1).all()


def test_weights_lie_in_0_1_and_fall_with_gamma_and_with_disagreement():
    delta, mask = torch.rand(4, 9), torch.ones(4, 9)
    before = torch.full_like(delta, 2.0)
    for gamma in (0.0, 0.01, 1.0, 50.0):
        w = token_weights(delta, mask, gamma)
        assert ((w > 0) & (w <= 1)).all() and (w <= before).all()
        before = w
    order = delta.flatten().argsort()
    assert (w.flatten()[order].diff() <= 0).all()
    assert (token_weights(delta, mask, 0.0) == 1).all() and (sequence_weights(delta[:, 0], 0.0) == 1).all()
    assert_close(sequence_weights(torch.tensor([0.0, 2.0]), 0.5), torch.tensor([1.0, math.exp(-1)]))


def test_what_is_masked_does_not_matter():
    other = READINGS.clone()
    other[:, 1, 2] = torch.tensor([torch.nan, 1e30])
    for level in ("token", "sequence"):
        for stat in ("var", "range", "prob"):
            assert_close(disagreement(other, MASK, level, stat), disagreement(READINGS, MASK, level, stat))
    loss = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, torch.nan]])
    assert weighted_mean(loss, MASK, torch.ones(2, 3)).item() == 3.0


def test_weighted_mean_by_hand():
    loss, w = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.5, 0.5]])
    assert weighted_mean(loss, MASK, w).item() == pytest.approx((1 + 2 + 3 + 2 + 2.5) / 4)
    # official form: mean of (1+2+3)/3 = 2 and (2+2.5)/max(1, 1) = 4.5
    assert weighted_mean(loss, MASK, w, "sequence").item() == pytest.approx((2 + 4.5) / 2)


def test_sequence_weights_do_not_cancel():
    """In the official code w_b multiplies every token of sequence b and also that sequence's normaliser, so it divides
    out: the loss stays the unweighted one to every digit, as long as no sum of weights falls below 1. With the batch
    normaliser a sequence that the teachers dispute counts less. A false alarm is impossible: both sides are computed
    here from the same numbers."""
    loss, mask = torch.rand(3, 50, dtype=torch.float64) + torch.tensor([[0.0], [1.0], [5.0]]), torch.ones(3, 50)
    w = sequence_weights(torch.tensor([0.0, 0.1, 3.0], dtype=torch.float64), 1.0).unsqueeze(1).expand(3, 50)
    one = torch.ones_like(w)
    assert_close(weighted_mean(loss, mask, w, "sequence"), weighted_mean(loss, mask, one, "sequence"), rtol=1e-12, atol=0)
    assert weighted_mean(loss, mask, w).item() < 0.7 * weighted_mean(loss, mask, one).item()


def test_the_official_form_has_a_cliff_below_one():
    loss, mask = torch.ones(1, 4), torch.ones(1, 4)
    assert weighted_mean(loss, mask, torch.full((1, 4), 0.25), "sequence").item() == pytest.approx(1.0)
    assert weighted_mean(loss, mask, torch.full((1, 4), 0.125), "sequence").item() == pytest.approx(0.5)


@pytest.mark.parametrize("normalizer", ["batch", "sequence"])
def test_coefficients_are_the_weighted_mean_and_ignore_the_split(normalizer):
    loss, w = torch.rand(4, 6, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)
    mask = (torch.arange(6) < torch.tensor([[6], [1], [3], [5]])).long()
    c = coefficients(mask, w, normalizer)
    parts = sum((c[i : i + 1] * loss[i : i + 1]).sum() for i in range(4))
    assert_close(parts, weighted_mean(loss, mask, w, normalizer), rtol=1e-14, atol=0)


def test_padding_changes_nothing():
    loss, w = torch.rand(2, 3), torch.rand(2, 3)
    wide = lambda x, fill: torch.cat([x, torch.full((*x.shape[:-1], 4), fill)], -1)
    mask = wide(MASK, 0)
    for n in ("batch", "sequence"):
        assert_close(weighted_mean(wide(loss, torch.nan), mask, wide(w, 9.0), n), weighted_mean(loss, MASK, w, n))
    for level in ("token", "sequence"):
        d, padded = disagreement(READINGS, MASK, level, "var"), disagreement(wide(READINGS, 3.0), mask, level, "var")
        assert_close(padded[:, :3] if level == "token" else padded, d)
    delta = disagreement(READINGS, MASK, "token", "var")
    assert_close(token_weights(wide(delta, 99.0), mask, 1.0)[:, :3], token_weights(delta, MASK, 1.0))


def test_refusals():
    with pytest.raises(ValueError, match="variance of 1 context"):
        disagreement(READINGS[:1], MASK, "token", "var")
    with pytest.raises(ValueError, match="every token is masked"):
        token_weights(torch.zeros(1, 2), torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match="every token is masked"):
        weighted_mean(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="normalizer"):
        weighted_mean(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), "mean")
    with pytest.raises(ValueError, match="level"):
        disagreement(READINGS, MASK, "word", "var")
    assert (disagreement(READINGS[:1], MASK, "token", "range") == 0).all()


@pytest.mark.parametrize("normalizer", ["batch", "sequence"])
def test_weights_that_all_underflow_give_nobody_a_say(normalizer):
    """exp(-gamma d) is 0 from about 104 on in fp32: then the loss is 0, and not 0/0."""
    weights = sequence_weights(torch.tensor([200.0, 1e30]), 1.0).unsqueeze(1).expand(2, 3)
    loss = torch.rand(2, 3, requires_grad=True)
    mean = weighted_mean(loss, MASK, weights, normalizer)
    mean.backward()
    assert (weights == 0).all() and mean == 0 and (loss.grad == 0).all()
    one = torch.tensor([[1e-40] * 3, [0.0] * 3])  # of what is left, all have the say
    assert coefficients(MASK, one, "batch").sum().item() == pytest.approx(1, rel=1e-3)


def test_no_gradient_and_no_change_of_inputs():
    r = READINGS.clone().requires_grad_()
    delta = disagreement(r, MASK, "token", "range")
    w = token_weights(delta, MASK, 1.0)
    assert not delta.requires_grad and not w.requires_grad
    loss = torch.rand(2, 3, requires_grad=True)
    weighted_mean(loss, MASK, w).backward()
    assert loss.grad[1, 2] == 0 and (loss.grad.flatten()[:5] > 0).all()
    assert_close(r.detach(), READINGS, equal_nan=True)


# --- the worked numbers of the comments ------------------------------------------------------------------------------


def test_the_two_variances_of_two_readings():
    readings, mask = torch.tensor([[[-1.0]], [[-3.0]]]), torch.ones(1, 1)
    assert disagreement(readings, mask, "token", "var").item() == 2.0
    assert disagreement(readings, mask, "sequence", "var").item() == 1.0
    assert disagreement(readings, mask, "token", "range").item() == 2.0


def test_opposite_disputes_cancel_in_a_sequence():
    readings, mask = torch.tensor([[[-1.0, -3.0]], [[-3.0, -1.0]]]), torch.ones(1, 2)
    assert disagreement(readings, mask, "sequence", "var").item() == 0.0
    assert (disagreement(readings, mask, "token", "var") == 2.0).all()


def test_how_far_a_token_weight_can_fall():
    delta = torch.cat([torch.ones(1, 99), torch.tensor([[1e9]])], 1)  # q = 1, and one token far beyond the cap
    for gamma, usual, least in ((1.0, 1 / 2, 1 / 11), (0.01, 0.99, 0.91)):
        weights = token_weights(delta, torch.ones_like(delta), gamma)[0]
        assert weights[0].item() == pytest.approx(usual, abs=1e-3)
        assert weights[-1].item() == pytest.approx(least, abs=1e-3)


@pytest.mark.parametrize(("weight", "mean"), [(1.0, 3.0), (0.5, 3.0), (0.25, 1.5)])
def test_a_weight_that_cancels_until_it_falls_off_the_cliff(weight, mean):
    loss, mask = torch.full((1, 2), 3.0), torch.ones(1, 2)
    assert weighted_mean(loss, mask, torch.full((1, 2), weight), "sequence").item() == mean


@pytest.mark.parametrize("normalizer", ["batch", "sequence"])
def test_a_gradient_is_a_coefficient_and_the_weights_get_none(normalizer):
    loss, weights = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    weighted_mean(loss, MASK, weights, normalizer).backward()
    assert_close(loss.grad, coefficients(MASK, weights, normalizer))
    assert weights.grad is None
