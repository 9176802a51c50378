"""Every formula of losses.py: numbers worked out by hand, properties that name the mechanism, gradients, and no
surprises at the edges.
"""

import math

import pytest
import torch
from torch.testing import assert_close

import losses

LN2 = math.log(2)


def log_of(*p):
    return torch.tensor([p], dtype=torch.float64).log()


def random_logps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)


def test_kl_by_hand_in_both_directions():
    student, teacher = log_of(0.5, 0.5), log_of(0.9, 0.1)
    # KL(t||s) = .9 ln(.9/.5) + .1 ln(.1/.5) = .529008 - .160944 = .368064
    assert_close(losses.forward_kl(student, teacher).item(), 0.368064, atol=1e-6, rtol=0)
    # KL(s||t) = .5 ln(.5/.9) + .5 ln(.5/.1) = -.293893 + .804719 = .510826
    assert_close(losses.reverse_kl(student, teacher).item(), 0.510826, atol=1e-6, rtol=0)


def test_jsd_by_hand():
    # M = (.7, .3); .5 (.9 ln(.9/.7) + .1 ln(.1/.3)) + .5 (.5 ln(.5/.7) + .5 ln(.5/.3)) = .5 (.116322) + .5 (.087177) =
    # .101749
    assert_close(losses.jsd(log_of(0.5, 0.5), log_of(0.9, 0.1), 0.5).item(), 0.1017495, atol=1e-6, rtol=0)
    # alpha weighs the *teacher* in M: alpha .25, M = .75 (.5,.5) + .25 (.9,.1) = (.6, .4);
    # .25 (.9 ln 1.5 + .1 ln .25) + .75 (.5 ln(.5/.6) + .5 ln(.5/.4)) = .25 (.226289) + .75 (.020411) = .071880
    assert_close(losses.jsd(log_of(0.5, 0.5), log_of(0.9, 0.1), 0.25).item(), 0.0718805, atol=1e-6, rtol=0)


@pytest.mark.parametrize("divergence", [losses.forward_kl, losses.reverse_kl, losses.jsd])
def test_a_divergence_is_zero_for_equals_and_positive_otherwise(divergence):
    p, q = random_logps(3, 5, 7), random_logps(3, 5, 7, seed=1)
    assert_close(divergence(p, p), torch.zeros(3, 5, dtype=torch.float64))
    assert (divergence(p, q) > 0).all()


def test_jsd_never_exceeds_ln2_and_reaches_it_when_nothing_is_shared():
    apart = losses.jsd(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]]), 0.5)
    assert_close(apart, torch.tensor([LN2]))
    assert (losses.jsd(20 * random_logps(50, 9), 20 * random_logps(50, 9, seed=1)) <= LN2).all()


def test_the_jsd_vanishes_at_its_ends_instead_of_becoming_a_kl():
    s, t = random_logps(4, 6), random_logps(4, 6, seed=1)
    for a in (1e-4, 1 - 1e-4):
        assert (losses.jsd(s, t, a) < 2e-3 * (losses.forward_kl(s, t) + losses.reverse_kl(s, t))).all()
    # only JSD / alpha tends to a KL: near 0 to the forward one, and JSD / (1 - alpha) near 1 to the reverse one
    assert_close(losses.jsd(s, t, 1e-6) / 1e-6, losses.forward_kl(s, t), rtol=1e-4, atol=1e-6)
    assert_close(losses.jsd(s, t, 1 - 1e-6) / 1e-6, losses.reverse_kl(s, t), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5])
def test_jsd_refuses_its_ends(alpha):
    with pytest.raises(ValueError, match="alpha"):
        losses.jsd(log_of(0.5, 0.5), log_of(0.9, 0.1), alpha)


@pytest.mark.parametrize("divergence", [losses.forward_kl, losses.reverse_kl, losses.jsd])
def test_ruled_out_tokens_leave_value_and_gradient_finite(divergence):
    logits = torch.tensor([[1.0, 2.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0, -torch.inf]], dtype=torch.float64).log_softmax(-1)
    value = divergence(logits.log_softmax(-1), teacher)
    assert_close(value, divergence(logits.detach()[:, :2].log_softmax(-1), teacher[:, :2]))
    value.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 2] == 0


def test_a_teacher_that_allows_what_the_student_cannot_say_is_infinitely_far():
    assert losses.forward_kl(torch.tensor([[0.0, -torch.inf]]), log_of(0.5, 0.5).float()).isinf().all()


def test_forward_kl_pushes_logits_by_the_difference_of_probabilities():
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    teacher = random_logps(2, 5, seed=3)
    losses.forward_kl(logits.log_softmax(-1), teacher).sum().backward()
    assert_close(logits.grad, logits.detach().softmax(-1) - teacher.exp())


def test_gradients_by_finite_differences():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    teacher = random_logps(2, 3, 4, seed=5)
    for f in (losses.forward_kl, losses.reverse_kl, lambda s, t: losses.jsd(s, t, 0.3)):
        assert torch.autograd.gradcheck(lambda x, f=f: f(x.log_softmax(-1), teacher), logits)
    ids = torch.tensor([[0, 1, 2], [3, 0, 1]])
    plus, minus = random_logps(2, 3, 4, seed=6)[..., 0], random_logps(2, 3, 4, seed=7)[..., 0]
    chosen = lambda x: losses.token_logps(x.log_softmax(-1), ids)
    assert torch.autograd.gradcheck(lambda x: losses.contrastive(chosen(x), plus, minus, 0.5), logits)
    assert torch.autograd.gradcheck(lambda x: losses.feature_mse(x, teacher), logits)


def test_clip_stops_value_and_gradient_at_the_ceiling():
    d = torch.tensor([0.5, 1.9, 2.1, 9.0], requires_grad=True)
    clipped = losses.clip_tokens(d, 2.0)
    assert_close(clipped.detach(), torch.tensor([0.5, 1.9, 2.0, 2.0]))
    clipped.sum().backward()
    assert d.grad.tolist() == [1, 1, 0, 0]
    assert losses.clip_tokens(d, None) is d


def test_quantile_ceiling_ignores_masked_tokens():
    d = torch.tensor([[1.0, 2.0, 3.0, 1e9]])
    assert losses.quantile_ceiling(d, torch.tensor([[1, 1, 1, 0]]), 0.5).item() == 2.0
    assert losses.quantile_ceiling(torch.zeros(1, 2), torch.ones(1, 2), 0.9).item() == pytest.approx(1e-6)


def test_contrast_by_hand_and_its_dead_zones():
    student, positive = torch.tensor([-1.0, -1.0, -2.0, -1.0]), torch.tensor([-0.5, -0.5, -0.5, -1.0])
    negative = torch.tensor([-3.0, -1.2, -1.0, -9.0])
    # margin .5:  .5 + .5 - 2 < 0 -> 0;   .5 + .5 - .2 = .8;   .5 + 1.5 - 1 = 1;   .5 + 0 - 8 -> 0
    s = student.clone().requires_grad_()
    value = losses.contrastive(s, positive, negative, 0.5)
    assert_close(value.detach(), torch.tensor([0.0, 0.8, 1.0, 0.0]))
    value.sum().backward()
    # token 1 lies between the teachers: sign(-1 + .5) - sign(-1 + 1.2) = -2. Both teachers are above token 2: exactly
    # 0, though it has a loss.
    assert s.grad.tolist() == [0, -2, 0, 0]
    # a step towards both leaves the loss of token 2 as it is: .5 + 1.4 - .9 = 1
    assert losses.contrastive(student + 0.1, positive, negative, 0.5)[2].item() == pytest.approx(1.0)


def test_contrast_moves_only_the_student():
    plus, minus = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    losses.contrastive(torch.full((3,), 0.4, requires_grad=True), plus, minus, 0.5).sum().backward()
    assert plus.grad is None and minus.grad is None


def test_features_by_hand():
    # ((1-0)^2 + (2-4)^2) / 2 = 2.5
    assert_close(losses.feature_mse(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 4.0]]])), torch.tensor([[2.5]]))
    assert losses.feature_mse(torch.ones(1, 4, dtype=torch.bfloat16), torch.zeros(1, 4)).dtype == torch.float32


def test_entropy_by_hand():
    assert_close(losses.entropy(log_of(0.25, 0.25, 0.25, 0.25)).item(), math.log(4))
    assert losses.entropy(torch.tensor([[0.0, -torch.inf]])).item() == 0.0


def test_token_logps_picks_the_written_token():
    logps = random_logps(2, 3, 5)
    ids = torch.tensor([[4, 0, 2], [1, 1, 3]])
    for b in range(2):
        for t in range(3):
            assert losses.token_logps(logps, ids)[b, t] == logps[b, t, ids[b, t]]


def test_inputs_are_never_changed():
    s, t = random_logps(2, 3, 4), random_logps(2, 3, 4, seed=1)
    mask, one = torch.ones(2, 3), s[..., 0].clone()
    before = [x.clone() for x in (s, t, mask, one)]
    for f in (losses.forward_kl, losses.reverse_kl, losses.jsd, losses.feature_mse):
        f(s, t)
    losses.clip_tokens(one, -1.0), losses.quantile_ceiling(one, mask, 0.5), losses.entropy(s)
    losses.contrastive(one, one, one, 0.5), losses.token_logps(s, torch.zeros(2, 3, dtype=torch.long))
    for x, y in zip((s, t, mask, one), before, strict=True):
        assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("divergence", [losses.forward_kl, losses.reverse_kl, losses.jsd])
def test_top_k_with_tail_is_a_divergence_below_the_full_one_and_equal_at_k_v(divergence):
    s, t = 2 * random_logps(40, 12), 2 * random_logps(40, 12, seed=1)
    s, t = s.log_softmax(-1), t.log_softmax(-1)
    full, before = divergence(s, t), torch.zeros(40, dtype=torch.float64)
    for k in (1, 3, 6, 11):
        bs, bt = losses.top_k_with_tail(s, t, k)
        assert bs.shape == (40, k + 1)
        assert_close(bs.exp().sum(-1), torch.ones(40, dtype=torch.float64))  # a distribution: without the tail it would not be
        value = divergence(bs, bt)
        assert (value >= before - 1e-12).all() and (value <= full + 1e-12).all()
        before = value
    assert_close(divergence(*losses.top_k_with_tail(s, t, 12)), full)
    assert_close(divergence(*losses.top_k_with_tail(s, t, 99)), full)


def test_top_k_by_hand_and_its_gradient():
    s, t = log_of(0.5, 0.3, 0.2), log_of(0.1, 0.8, 0.1)
    # the teacher's first is token 1; buckets (.3, .7) and (.8, .2): .8 ln(.8/.3) + .2 ln(.2/.7) = .784663 - .250553 =
    # .534111
    assert losses.forward_kl(*losses.top_k_with_tail(s, t, 1)).item() == pytest.approx(0.534111, abs=1e-6)
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    teacher = random_logps(3, 6, seed=2)
    for k in (2, 6):
        assert torch.autograd.gradcheck(
            lambda x, k=k: losses.forward_kl(*losses.top_k_with_tail(x.log_softmax(-1), teacher, k)), logits
        )


def test_the_sampled_estimator_is_right_on_average_in_value_and_gradient():
    """Weigh every token of the vocabulary by the student's probability: the expectation must be the full reverse KL,
    exactly.
    """
    logits = torch.randn(1, 7, dtype=torch.float64, requires_grad=True)
    teacher = random_logps(1, 7, seed=4)
    (full,) = torch.autograd.grad(losses.reverse_kl(logits.log_softmax(-1), teacher).sum(), logits)
    student = logits.log_softmax(-1)
    p = student.detach().exp()
    estimate = (p * losses.sampled_reverse_kl(student, teacher)).sum()
    assert_close(estimate.detach(), losses.reverse_kl(student, teacher).sum().detach())
    (average,) = torch.autograd.grad(estimate, logits)
    assert_close(average, full)
    naive = (p * (logits.log_softmax(-1) - teacher)).sum()  # the gradient of the value itself has expectation 0: it teaches nothing
    assert torch.autograd.grad(naive, logits)[0].abs().max() < 1e-12


# --- the worked numbers of the comments ------------------------------------------------------------------------------


def test_the_push_on_a_token_that_the_student_never_says():
    p, q = [0.97, 0.01, 0.01, 0.01], [0.1, 0.8, 0.05, 0.05]
    logits = log_of(*p).requires_grad_()
    pushes = {}
    for divergence in (losses.forward_kl, losses.reverse_kl):
        (gradient,) = torch.autograd.grad(divergence(logits.log_softmax(-1), log_of(*q)).sum(), logits)
        pushes[divergence.__name__] = -gradient[0, 1].item()
    assert pushes["forward_kl"] == pytest.approx(0.80 - 0.01)
    full = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert full == pytest.approx(2.13, abs=0.005) and math.log(0.80 / 0.01) == pytest.approx(4.38, abs=0.005)
    assert pushes["reverse_kl"] == pytest.approx(0.01 * (full + math.log(0.80 / 0.01))) == pytest.approx(0.065, abs=1e-3)


def test_cross_entropy_is_the_forward_kl_to_a_teacher_that_is_sure():
    student, label = random_logps(5), torch.tensor(3)
    sure = torch.full((5,), -torch.inf, dtype=torch.float64)
    sure[label] = 0.0
    assert_close(losses.forward_kl(student, sure), -losses.token_logps(student, label))


def test_autograd_keeps_nothing_of_a_difference_but_everything_of_a_product():
    p, q = random_logps(4).requires_grad_(), random_logps(4, seed=1)
    kept = lambda x: [n for n in dir(x.grad_fn) if n.startswith("_saved") and torch.is_tensor(getattr(x.grad_fn, n))]
    assert not kept(p - q) and kept(p * q)


def test_without_the_tail_a_distance_can_be_negative():
    student, teacher = log_of(0.9, 0.1), log_of(0.5, 0.5)
    assert losses.kl(teacher[..., :1], student[..., :1]).item() == pytest.approx(-0.29, abs=0.005)
    assert losses.forward_kl(*losses.top_k_with_tail(student, teacher, 1)).item() > 0


def test_a_small_tail_keeps_its_digits_in_fp32():
    logps = torch.tensor([1 - 1e-9, 1e-9], dtype=torch.float64).log().float()
    assert math.log(1e-9) == pytest.approx(-20.7, abs=0.05)
    assert losses.top_k_with_tail(logps, logps, 1)[0][1].item() == pytest.approx(math.log(1e-9), abs=1e-5)
    assert (1 - logps[:1].exp()).log().item() == -math.inf
    assert torch.tensor(1 - 2**-24).item() < 1 and abs(2**-24 - 6e-8) < 1e-9


def test_what_bf16_has_around_a_small_number():
    around = [torch.tensor(x).bfloat16().item() for x in (0.1230, 0.1234, 0.1235)]
    assert around[0] == pytest.approx(0.1230, abs=1e-4) and around[1] == around[2] == pytest.approx(0.1235, abs=1e-4)
