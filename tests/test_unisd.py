"""The objective: equal to the plain formula whatever the chunk, the padding, the order and the micro-batch; and what is
off costs nothing.
"""

import itertools
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCAB, small_model
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import agreement
import losses
from ema import EMA
from engine import head as head_file
from engine.config import Config
from engine.head import Head, agree, check_head, chunked_objective, each_token, head_of, sampled_logps, through_head
from engine.reading import PackedReader, passes, token_slices
from train import scaled, weigh_step
from unisd import (
    RECIPES,
    Batch,
    Mechanisms,
    Reading,
    Scores,
    Tokens,
    Weights,
    feature_matching,
    objective,
    read,
    read_plainly,
    score_teachers,
    tokens_of,
    weigh,
)

EXACT = dict(rtol=1e-12, atol=1e-12)
EVERYTHING = Config(agreement="token", gamma=1.0, w_contrast=0.3, margin=0.2, w_match=0.2, w_nll=0.1, chunk=5)


def prompts(seed, n=4):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (int(k),), generator=g).tolist() for k in torch.randint(3, 9, (n,), generator=g)]


def batch_of(lengths=(5, 1, 3, 8), contexts=3):
    g = torch.Generator().manual_seed(99)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=g)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    n = len(lengths)
    return Batch(prompts(1, n), prompts(2, n), prompts(3, n), [prompts(10 + k, n) for k in range(contexts)], ids, mask)


@dataclass
class Step:
    """A step up to the student's own pass, as train.py makes it."""

    reader: PackedReader
    scores: Scores
    weights: Weights
    tokens: Tokens

    def loss(self, model, m, rows=slice(None), piece=slice(None), states=None):
        batch = self.reader.batch
        states = read(model, batch.student[rows], batch.ids[rows], batch.mask[rows]) if states is None else states
        teacher = None if self.scores.states is None else self.scores.states[piece]
        return chunked_objective(states, head_of(model, VOCAB), teacher, self.reader.head, self.tokens[piece], m, m.chunk)


def scored(model, batch, m, teacher=nullcontext, ceiling=None):
    with teacher():
        reader = PackedReader(model, head_of(model, VOCAB).detach(), batch, m.max_tokens_per_pass, m.chunk)
        scores = score_teachers(reader, batch, m, with_contexts=m.agreement_budget >= 1)
    weights, own_ceiling = weigh_step(reader, scores, teacher, m)
    tokens = tokens_of(batch, scores, weights, own_ceiling if ceiling is None else ceiling)
    return Step(reader, scores, weights, tokens)


def whole_step(model, batch, m, teacher=nullcontext, micro=99, ceiling=None):
    """Loss and gradients of one optimizer step in micro-batches of `micro` rows."""
    model.zero_grad()
    step, total = scored(model, batch, m, teacher, ceiling), 0.0
    for rows, piece in token_slices(batch.mask, micro):
        loss, _ = step.loss(model, m, rows, piece)
        loss.backward()
        total += loss.detach()
    return total, {n: p.grad.clone() for n, p in model.named_parameters()}


def plain(model, batch, m, ceiling):
    """The same objective written the obvious way: one row at a time, whole (T, V) log-probabilities, no head of ours,
    no chunks.
    """

    def logps(prompt, b, tau):
        ids = torch.tensor([prompt + batch.ids[b, : batch.mask[b].sum()].tolist()])
        out = model(input_ids=ids, output_hidden_states=True)
        at = slice(len(prompt) - 1, ids.shape[1] - 1)  # logits at i predict token i + 1
        return (out.logits[0, at, :VOCAB] / tau).log_softmax(-1), out.hidden_states[-1][0, at]

    B, T = batch.ids.shape
    div, contrast, match, nll = (torch.zeros(B, T, dtype=torch.float64) for _ in range(4))
    readings = torch.zeros(len(batch.contexts), B, T, dtype=torch.float64)
    for b in range(B):
        n, ids = batch.mask[b].sum(), batch.ids[b, : batch.mask[b].sum()]
        s, fs = logps(batch.student[b], b, m.distill_temperature)
        with torch.no_grad():
            t, ft = logps(batch.teacher[b], b, m.distill_temperature)
            bad, _ = logps(batch.negative[b], b, m.distill_temperature)
            for k, c in enumerate(batch.contexts):
                readings[k, b, :n] = losses.token_logps(logps(c[b], b, m.agreement_temperature)[0], ids)
        d = {"forward": losses.forward_kl, "reverse": losses.reverse_kl, "jsd": lambda x, y: losses.jsd(x, y, m.alpha)}
        div[b, :n] = d[m.divergence](s, t)
        pick = lambda x, ids=ids: losses.token_logps(x, ids)
        contrast[b, :n] = losses.contrastive(pick(s), pick(t), pick(bad), m.margin)
        match[b, :n], nll[b, :n] = losses.feature_mse(fs, ft), -pick(s)
    w = torch.ones(B, T, dtype=torch.float64)
    if m.agreement == "token":
        w = agreement.token_weights(agreement.disagreement(readings, batch.mask, "token", m.stat), batch.mask, m.gamma)
    elif m.agreement == "sequence":
        delta = agreement.disagreement(readings, batch.mask, "sequence", m.stat)
        w = agreement.sequence_weights(delta, m.gamma).unsqueeze(1).expand(B, T)
    mean = lambda x, w: agreement.weighted_mean(x, batch.mask, w, m.normalizer)
    one = torch.ones_like(w)
    loss = m.w_div * mean(losses.clip_tokens(div, ceiling), w) + m.w_nll * mean(nll, one)
    return loss + m.w_contrast * mean(contrast, one) + m.w_match * mean(match, one)


CASES = [
    replace(EVERYTHING, divergence=d, alpha=0.3, agreement=a, stat=s, normalizer=n, distill_temperature=0.7)
    for d, (a, s, n) in itertools.product(
        ("forward", "reverse", "jsd"), (("token", "var", "batch"), ("sequence", "range", "sequence"), ("none", "var", "batch"))
    )
]


@pytest.mark.parametrize("m", CASES, ids=lambda m: f"{m.divergence}-{m.agreement}")
@pytest.mark.parametrize("ceiling", [None, 0.4])
def test_equals_the_plain_formula_in_value_and_gradient(model, m, ceiling):
    batch, ceiling = batch_of(), None if ceiling is None else torch.tensor(ceiling, dtype=torch.float64)
    model.zero_grad()
    expected = plain(model, batch, m, ceiling)
    expected.backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
    for chunk in (1, 5, 1000):
        value, ours = whole_step(model, batch, replace(m, chunk=chunk), ceiling=ceiling)
        assert_close(value, expected.detach(), **EXACT)
        for name in gradient:
            assert_close(ours[name], gradient[name], **EXACT, msg=lambda s, n=name: f"{n}: {s}")


@pytest.mark.parametrize("m", CASES, ids=lambda m: f"{m.divergence}-{m.agreement}")
def test_the_micro_batch_split_never_matters(model, m):
    batch = batch_of()
    one, whole = whole_step(model, batch, m)
    for micro in (1, 2, 3):
        value, gradient = whole_step(model, batch, m, micro=micro)
        assert_close(value, one, **EXACT)
        for name in whole:
            assert_close(gradient[name], whole[name], **EXACT)


def test_padding_and_what_comes_after_the_end_never_matter(model):
    batch = batch_of()
    one, whole = whole_step(model, batch, EVERYTHING)
    rubbish = torch.where(batch.mask.bool(), batch.ids, (batch.ids + 7) % VOCAB)
    wide = replace(batch, ids=torch.nn.functional.pad(rubbish, (0, 6), value=5), mask=torch.nn.functional.pad(batch.mask, (0, 6)))
    value, gradient = whole_step(model, wide, EVERYTHING)
    assert_close(value, one, **EXACT)
    for name in whole:
        assert_close(gradient[name], whole[name], **EXACT)


def test_the_order_of_rows_and_the_token_budget_never_matter(model):
    batch = batch_of()
    one, _ = whole_step(model, batch, EVERYTHING)
    for budget in (1, 20, 40):
        assert_close(whole_step(model, batch, replace(EVERYTHING, max_tokens_per_pass=budget))[0], one, **EXACT)
    p = [2, 0, 3, 1]
    take = lambda x: [x[i] for i in p]
    turned = Batch(
        take(batch.student),
        take(batch.teacher),
        take(batch.negative),
        [take(c) for c in batch.contexts],
        batch.ids[p],
        batch.mask[p],
    )
    assert_close(whole_step(model, turned, EVERYTHING)[0], one, **EXACT)


def test_passes_cover_every_row_within_the_budget():
    lengths = [7, 3, 9, 1, 3, 12]
    groups = passes(lengths, 14)
    assert sorted(sum(groups, [])) == list(range(6))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 14 for g in groups)


def test_read_gives_the_states_that_predict_each_token(model):
    batch = batch_of()
    states = read(model, batch.student, batch.ids, batch.mask)
    ours = sampled_logps(states, batch.ids[batch.mask.bool()], head_of(model, VOCAB), 1.0, 4)
    theirs = []
    for b, prompt in enumerate(batch.student):
        row = prompt + batch.ids[b, : batch.mask[b].sum()].tolist()
        logps = model(input_ids=torch.tensor([row])).logits[0, :, :VOCAB].log_softmax(-1)
        theirs += [logps[i - 1, row[i]] for i in range(len(prompt), len(row))]
    assert_close(ours, torch.stack(theirs).detach(), **EXACT)


def test_prompts_answers_and_mask_have_as_many_rows(model):
    batch = batch_of()
    with pytest.raises(ValueError):
        read(model, batch.student[:-1], batch.ids, batch.mask)
    with pytest.raises(ValueError):
        read(model, batch.student, torch.cat([batch.ids, batch.ids[:1]]), batch.mask)


def test_the_defaults_are_plain_self_distillation():
    """Forward KL to the teacher, over the whole vocabulary, and nothing beside it."""
    m = Mechanisms()
    assert (m.w_div, m.divergence, m.estimator, m.distill_temperature) == (1.0, "forward", "full", 1.0)
    assert (m.agreement, m.clip, m.clip_quantile, m.w_contrast, m.w_match, m.w_nll) == ("none", 0, 0, 0, 0, 0)


def test_what_measures_trains_nothing():
    assert all(RECIPES[name]["steps"] == RECIPES[name]["epochs"] == 0 for name in ("raw", "privileged"))


def test_a_reading_keeps_no_cache(model):
    batch, seen = batch_of(), []
    hook = model.get_decoder().register_forward_hook(lambda _, args, out: seen.append(out.past_key_values))
    read(model, batch.student, batch.ids, batch.mask)
    hook.remove()
    assert seen == [None]


def test_the_entropy_is_taken_without_a_graph(monkeypatch):
    graphs, entropy = [], losses.entropy
    monkeypatch.setattr(losses, "entropy", lambda logps: graphs.append(logps.requires_grad) or entropy(logps))
    student = torch.randn(3, VOCAB).log_softmax(-1).requires_grad_()
    objective(student, student.detach(), Tokens(torch.tensor([1, 2, 3]), *torch.ones(2, 3)), Mechanisms())
    assert graphs == [False]


def test_what_is_logged_holds_on_to_no_graph():
    student = torch.randn(3, VOCAB, dtype=torch.float64).log_softmax(-1).requires_grad_()
    tokens = Tokens(torch.tensor([1, 2, 3]), *torch.ones(2, 3), negative=torch.zeros(3))
    _, said = objective(student, student.detach().flip(0), tokens, Mechanisms(w_contrast=1.0))
    _, matched = feature_matching(student, student.detach().flip(0), tokens, Mechanisms(w_match=1.0))
    assert {*said, *matched} == {"div", "contrast", "nll", "entropy", "match"}
    assert not any(value.requires_grad for value in (said | matched).values())


def test_gradient_by_finite_differences_through_an_identity_head():
    """With an identity head the function eats logits: that is what the golden vectors do."""
    N, V, eye = 4, 6, Head(torch.eye(6, dtype=torch.float64), 6)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(N, V, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(N, V, generator=g, dtype=torch.float64)
    negative, share, plain_share = (torch.rand(N, generator=g, dtype=torch.float64) for _ in range(3))
    tokens = Tokens(torch.tensor([0, 5, 2, 2]), share, plain_share, -3 * negative)
    for d in ("forward", "reverse", "jsd"):
        m = replace(EVERYTHING, divergence=d, chunk=3)
        loss = lambda x, m=m: chunked_objective(x, eye, teacher, eye, tokens, m, m.chunk)[0]
        assert torch.autograd.gradcheck(loss, logits)
        upstream = torch.autograd.grad(3.0 * loss(logits), logits)[0]
        assert_close(upstream, 3.0 * torch.autograd.grad(loss(logits), logits)[0], **EXACT)


def test_a_bias_and_a_softcap_are_part_of_the_head():
    g = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    h, teacher = rand(5, 4).requires_grad_(), rand(5, 4)
    w, b = rand(7, 4).requires_grad_(), rand(7).requires_grad_()
    fifth = torch.full((5,), 0.2, dtype=torch.float64)
    tokens, head = Tokens(torch.tensor([0, 1, 2, 3, 4]), fifth, fifth), Head(w, 7, b, softcap=3.0)
    ours = torch.autograd.grad(chunked_objective(h, head, teacher, head.detach(), tokens, Config(), 2)[0], (h, w, b))
    logp = lambda x, w, b: (3 * torch.tanh((x @ w.T + b) / 3)).log_softmax(-1)
    plain_loss = losses.forward_kl(logp(h, w, b), logp(teacher, w, b).detach()).mean()
    for x, y in zip(ours, torch.autograd.grad(plain_loss, (h, w, b)), strict=True):
        assert_close(x, y, **EXACT)


def test_padded_vocabulary_gets_no_mass_and_no_gradient():
    model = small_model(tied=False)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = 50.0  # would win every softmax if it were looked at
    _, gradient = whole_step(model, batch_of(), EVERYTHING)
    assert (gradient["lm_head.weight"][VOCAB:] == 0).all() and (gradient["lm_head.weight"][:VOCAB] != 0).any()


def test_a_student_that_already_is_its_teacher_has_nothing_to_learn(model):
    batch = batch_of()
    batch = replace(batch, teacher=batch.student)
    value, gradient = whole_step(model, batch, Config(w_match=0.5))
    assert abs(value) < 1e-12 and all(g.abs().max() < 1e-12 for g in gradient.values())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_agreement_really_changes_loss_and_gradient(model, level):
    batch = batch_of()
    off, g_off = whole_step(model, batch, Config())
    on, g_on = whole_step(model, batch, Config(agreement=level, gamma=1.0))
    assert abs(on - off) > 1e-4 and (g_on["model.norm.weight"] - g_off["model.norm.weight"]).abs().max() > 1e-6
    official, _ = whole_step(model, batch, Config(agreement="sequence", gamma=0.01, normalizer="sequence"))
    unweighted, _ = whole_step(model, batch, Config(normalizer="sequence"))
    assert_close(official, unweighted, rtol=1e-2, atol=0)  # only sequences of one token (sum of weights < 1) still differ


def test_clip_removes_the_gradient_of_the_tokens_above_it(model):
    batch = batch_of()
    step = scored(model, batch, Config())
    states = read(model, batch.student, batch.ids, batch.mask).detach().requires_grad_()
    _, each = step.loss(model, Config(), states=states)
    step.tokens.ceiling = ceiling = each["div"].median()
    loss, _ = step.loss(model, Config(), states=states)
    (gradient,) = torch.autograd.grad(loss, states)
    above = each["div"] > ceiling
    assert (gradient[above] == 0).all() and (gradient[each["div"] < ceiling].abs().sum(1) > 0).all()


def test_an_ema_teacher_speaks_with_its_own_weights_and_its_own_head(model):
    batch = batch_of()
    ema = EMA(model, 0.5)
    other = small_model(seed=5)
    model.load_state_dict(other.state_dict())  # the student moves on; the shadow stays
    value, _ = whole_step(model, batch, Config(), teacher=lambda: ema.applied_to(model))
    teacher, student = small_model(seed=0), small_model(seed=5)
    per_token = []
    for b in range(4):
        n = batch.mask[b].sum()
        row = lambda p, b=b, n=n: torch.tensor([p + batch.ids[b, :n].tolist()])
        s = student(input_ids=row(batch.student[b])).logits[0, -n - 1 : -1, :VOCAB].log_softmax(-1)
        t = teacher(input_ids=row(batch.teacher[b])).logits[0, -n - 1 : -1, :VOCAB].log_softmax(-1)
        per_token.append(losses.forward_kl(s, t))
    assert_close(value, torch.cat(per_token).mean().detach(), **EXACT)
    assert_close(model.lm_head.weight, other.lm_head.weight, rtol=0, atol=0)


PASSES = {  # recipe settings -> how often the model is read in one step of one micro-batch
    "divergence": (Config(), 2),
    "cross-entropy only": (Config(w_div=0.0, w_nll=1.0), 1),
    "token agreement": (Config(agreement="token"), 5),
    "agreement with gamma 0": (Config(agreement="token", gamma=0.0), 2),
    "agreement without a divergence": (Config(agreement="token", w_div=0.0, w_match=1.0), 2),
    "contrast": (Config(w_contrast=0.1), 3),
    "match only": (Config(w_div=0.0, w_match=1.0), 2),
    "all": (EVERYTHING, 6),
}


@pytest.mark.parametrize("name", PASSES)
def test_what_is_off_costs_no_pass(model, name):
    m, expected = PASSES[name]
    rows, batch = [], batch_of()
    model.model.register_forward_hook(lambda _, args, kwargs, out: rows.append(len(out[0])), with_kwargs=True)
    whole_step(model, batch, m)
    assert sum(rows) == expected * len(batch.ids)  # several readings may share a pass


class Largest(TorchDispatchMode):
    """Remembers the largest tensor with a vocabulary axis that any operation made."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] == VOCAB and x.shape != (32, VOCAB):  # not weight.T
                self.rows = max(self.rows, x.numel() // VOCAB)
        return out


def test_no_tensor_of_tokens_times_vocabulary_exists(model):
    batch = batch_of((9, 9, 9, 9))  # 36 tokens, hidden size 32: only a vocabulary axis has 37 entries
    with Largest() as seen:
        whole_step(model, batch, replace(EVERYTHING, chunk=5))
    assert 0 < seen.rows <= 5


def test_without_gradients_none_is_made(model):
    """clip_quantile reads the student once more under no_grad: there the backward products of the head would be waste."""
    head, asked = head_of(model, VOCAB), []

    def terms(logits, teacher_logits, which):
        asked.append(logits.requires_grad)
        return logits.logsumexp(-1).sum(), {"x": logits[:, 0]}

    states = torch.randn(5, head.weight.shape[1], dtype=head.weight.dtype, requires_grad=True)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            through_head(states, head, terms, chunk=5)
    assert asked == [True, False]


def test_a_match_only_recipe_never_touches_the_head(model):
    with Largest() as seen:
        whole_step(model, batch_of(), Config(w_div=0.0, w_match=1.0))
    assert seen.rows == 0


def test_bf16_autocast_is_close_and_keeps_fp32_gradients():
    model = small_model(dtype=torch.float32)
    exact, _ = whole_step(model, batch_of(), Config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = whole_step(model, batch_of(), Config())
    assert_close(value, exact, rtol=0.05, atol=0)
    assert all(g.dtype == torch.float32 for g in gradient.values())


def test_nothing_given_is_changed(model):
    batch = batch_of()
    ids, mask, lists = batch.ids.clone(), batch.mask.clone(), [list(p) for p in batch.teacher]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    whole_step(model, batch, EVERYTHING)
    assert (batch.ids == ids).all() and (batch.mask == mask).all() and batch.teacher == lists
    for n, p in model.named_parameters():
        assert_close(p.detach(), weights[n], rtol=0, atol=0)


def test_the_estimators_against_the_full_divergence(model):
    batch = batch_of()
    for d in ("forward", "reverse", "jsd"):
        full, g_full = whole_step(model, batch, Config(divergence=d))
        all_of_it, g_all = whole_step(model, batch, Config(divergence=d, estimator="top-k", top_k=VOCAB, chunk=3))
        assert_close(all_of_it, full, **EXACT)
        for n in g_full:
            assert_close(g_all[n], g_full[n], **EXACT)
        few, _ = whole_step(model, batch, Config(divergence=d, estimator="top-k", top_k=5))
        assert 0 < few < full
    m = Config(divergence="reverse", estimator="sampled")
    step = scored(model, batch, m)
    _, each = step.loss(model, m)
    ids, head = batch.ids[batch.mask.bool()], head_of(model, VOCAB)
    student = sampled_logps(read(model, batch.student, batch.ids, batch.mask), ids, head, 1.0, 8)
    teacher = sampled_logps(step.scores.states, ids, head, 1.0, 8)
    assert_close(each["div"], student - teacher, **EXACT)


def test_a_ceiling_without_a_divergence_is_no_ceiling(model):
    assert scored(model, batch_of(), Config(w_div=0.0, w_nll=1.0, clip=2.0)).tokens.ceiling is None


def test_a_head_that_is_not_the_models_own_is_noticed(model):
    check_head(model, VOCAB, [5, 6, 7])
    for change in (lambda x: x * 0.5, lambda x: 30 * torch.tanh(x / 30), lambda x: x + x.roll(1, -1)):
        hook = model.lm_head.register_forward_hook(lambda _, args, out, change=change: change(out))
        with pytest.raises(ValueError, match="scales or changes"):
            check_head(model, VOCAB, [5, 6, 7])
        hook.remove()


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_head_has_every_factor_of_its_config_and_lends_its_tensors(scale):
    config = SimpleNamespace(logit_scale=4.0 * scale, lm_head_multiplier=2.0, logits_scaling=8.0)
    config.get_text_config = lambda: config
    linear, states = torch.nn.Linear(3, 5).double(), torch.randn(2, 3, dtype=torch.float64)
    head = head_of(SimpleNamespace(get_output_embeddings=lambda: linear, config=config), 5)
    assert head.scale == scale  # 4 x 2 / 8
    assert_close(head(states), (scale * linear(states)).log_softmax(-1).detach(), **EXACT)
    lent = head.detach()
    for ours, theirs in ((lent.weight, linear.weight), (lent.bias, linear.bias)):
        assert not ours.requires_grad and ours.data_ptr() == theirs.data_ptr()


def test_a_head_is_tried_where_its_largest_logit_is_30_whatever_its_sign():
    seen = []
    for seed in range(8):
        model = small_model(seed)
        model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out[..., :VOCAB]))
        check_head(model, VOCAB, [5, 6, 7, 8])
    assert [logits.abs().max().item() for logits in seen] == [pytest.approx(30, rel=1e-4)] * 8
    assert {bool(logits.max() > -logits.min()) for logits in seen} == {True, False}  # of either sign


def test_two_ways_to_the_same_logits_agree_up_to_five_per_cent_of_their_spread():
    """Spread is around the mean of the log-probs: they are all negative, and beside their size 6 per cent looks like 2."""
    theirs = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    said = theirs.log_softmax(-1)
    spread = (said - said.mean()).norm()
    step = (theirs + 0.01 * torch.tensor([1.0, -1.0, 1.0, -1.0])).log_softmax(-1) - said
    for off in (0.04, 0.06):
        ours = said + step * off * spread / step.norm()
        ours = ours if off < 0.05 else ours.logsumexp(-1, keepdim=True) + ours
        with nullcontext() if off < 0.05 else pytest.raises(ValueError, match=r"differ \(off by 6 %\)"):
            agree(ours, theirs, "differ")
    with pytest.raises(ValueError, match="not finite"):
        agree(theirs, theirs.masked_fill(theirs > 2, torch.inf), "differ")


def test_a_scaled_head_has_the_gradient_of_the_plain_formula():
    """Granite and Cohere scale their logits, Gemma caps them: what a chunk's gradient goes back through by hand is linear still."""
    student, teacher, (weight, teacher_weight), tokens = uneven(9)
    student.requires_grad_(), weight.requires_grad_()
    head, other = (Head(w, 11, softcap=3.0, scale=0.4) for w in (weight, teacher_weight))
    logps = lambda x, w: (3 * torch.tanh(0.4 * (x @ w[:11].T) / 3) / EVERYTHING.distill_temperature).log_softmax(-1)
    expected, _ = objective(logps(student, weight), logps(teacher, teacher_weight), tokens, EVERYTHING)
    expected = expected + feature_matching(student, teacher, tokens, EVERYTHING)[0]
    loss, _ = chunked_objective(student, head, teacher, other, tokens, EVERYTHING, chunk=4)
    assert_close(loss, expected, **EXACT)
    for x, y in zip(*(torch.autograd.grad(each, (student, weight)) for each in (loss, expected)), strict=True):
        assert_close(x, y, **EXACT)


# --- one formula: the plain objective, and the trainer's way to the same number --------------------------------------


def uneven(n, seed=0):
    """n tokens, all different: teacher, shares, negative. A token that got its neighbour's would be noticed."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)
    tokens = Tokens(torch.randint(0, 11, (n,), generator=g), rand(n), rand(n), -3 * rand(n), 1.5)
    weights = [rand(13, 6) - 0.5 for _ in range(2)]  # 13 rows, 11 in use
    return 4 * rand(n, 6) - 2, 4 * rand(n, 6) - 2, weights, tokens


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("sizes", [(8, 4, 2), (12, 4, 2), (6, 6, 2), (8, 8, 8), (32, 16, 1)])
def test_several_chunks_of_several_pieces_are_the_objective_on_whole_tensors(monkeypatch, divergence, sizes):
    """As with a real vocabulary, where a chunk has two teacher blocks and 32 pieces: whatever the three sizes, each token meets
    its own teacher, share and id. N = 29 leaves the last chunk, block and piece incomplete.
    """
    monkeypatch.setattr(head_file, "tokens_per_chunk", lambda *_: sizes)
    student, teacher, (weight, teacher_weight), tokens = uneven(29)
    m = replace(EVERYTHING, divergence=divergence)
    student.requires_grad_(), weight.requires_grad_()
    logps = lambda states, w: (states @ w[:11].T / m.distill_temperature).log_softmax(-1)
    loss, values = objective(logps(student, weight), logps(teacher, teacher_weight), tokens, m)
    match, matched = feature_matching(student, teacher, tokens, m)
    expected = torch.autograd.grad(loss + match, (student, weight))
    chunked, each = chunked_objective(student, Head(weight, 11), teacher, Head(teacher_weight, 11), tokens, m)
    assert_close(chunked, loss + match, **EXACT)
    for x, y in zip(torch.autograd.grad(chunked, (student, weight)), expected, strict=True):
        assert_close(x, y, **EXACT)
    assert each.keys() == (values | matched).keys()
    for name, value in (values | matched).items():
        assert_close(each[name], value, **EXACT)
    assert len(set(values["div"].tolist())) == 29


@pytest.mark.parametrize(
    ("n", "size", "expected"), [(5, 2, [(0, 2), (2, 4), (4, 5)]), (0, 1, [(0, 0)]), (1, 1, [(0, 1)]), (4, 2, [(0, 2), (2, 4)])]
)
def test_chunks_of_few_things(n, size, expected):
    assert [(part.start, part.stop) for part in head_file.chunks(n, size)] == expected


def test_pieces_are_small_on_a_cpu_and_large_on_a_gpu():
    assert head_file.tokens_per_chunk(0, 1_250_000) == head_file.tokens_per_chunk(0, 9_000_000) == (32, 16, 1)
    assert head_file.tokens_per_chunk(0, 1_250_000 // 2) == (64, 32, 2)
    assert head_file.tokens_per_chunk(0, 151_936) == (256, 128, 8) and head_file.tokens_per_chunk(0, 776) == (51_520, 25_760, 1_610)
    assert head_file.tokens_per_chunk(0, 151_936, cuda=True) == (512, 256, 128)
    assert head_file.tokens_per_chunk(7, 151_936, cuda=True) == (7, 7, 7)
    for vocab, cuda in ((100, True), (49_152, False), (3_000_000, True)):  # several whole pieces a side, two sides a chunk
        chunk, side, piece = head_file.tokens_per_chunk(0, vocab, cuda)
        assert chunk == 2 * side and side % piece == 0 and piece >= 1


@pytest.mark.parametrize("sizes", [(8, 4, 2), (6, 6, 3), (32, 16, 4)])
def test_each_token_is_measured_as_itself(monkeypatch, sizes):
    monkeypatch.setattr(head_file, "tokens_per_chunk", lambda *_: sizes)
    states, _, (weight, _), tokens = uneven(29)
    found = each_token(states, Head(weight, 11), 0.7, 0, lambda logps, which: losses.token_logps(logps, tokens.ids[which]))
    assert_close(found, losses.token_logps((states @ weight[:11].T / 0.7).log_softmax(-1), tokens.ids), **EXACT)


@pytest.mark.parametrize("budget", [1, 20, 40, 10_000])
def test_the_packed_reader_is_the_plain_one(model, budget):
    batch, m = batch_of(), EVERYTHING
    head = head_of(model, VOCAB).detach()
    packed = score_teachers(PackedReader(model, head, batch, budget, 3), batch, m)
    plainly = score_teachers(read_plainly(model, head, batch), batch, m)
    for name in ("states", "negative", "contexts"):
        assert_close(getattr(packed, name), getattr(plainly, name), **EXACT)
    some = [Reading("some", batch.contexts[0], 0.5, rows=[1, 3]), Reading("states", batch.teacher, rows=[2])]
    for reader in (PackedReader(model, head, batch, budget, 3), read_plainly(model, head, batch)):
        kept = reader(some)
        whole = read_plainly(model, head, batch)([replace(r, rows=None) for r in some])
        assert_close(kept["some"][[1, 3]], whole["some"][[1, 3]], **EXACT)
        assert (kept["some"][[0, 2]] == 0).all()


@pytest.mark.parametrize("budget", [20, 10_000])
def test_equal_readings_are_made_once(model, budget):
    """--contexts-include-teacher: context 0 is the teacher's own reading. Same numbers, and one pass over the answers less."""
    batch, m, tallies = batch_of(), EVERYTHING, [{}, {}]
    head = head_of(model, VOCAB).detach()
    included = replace(batch, contexts=[batch.teacher, *batch.contexts[1:]])
    score_teachers(PackedReader(model, head, batch, budget, 3, tallies[0]), batch, m)
    packed = score_teachers(PackedReader(model, head, included, budget, 3, tallies[1]), included, m)
    plainly = score_teachers(read_plainly(model, head, included), included, m)
    for name in ("states", "negative", "contexts"):
        assert_close(getattr(packed, name), getattr(plainly, name), **EXACT)
    spared = sum(map(len, batch.contexts[0])) + int(batch.mask.sum())
    assert tallies[0]["read"] - tallies[1]["read"] == spared
    rows = [
        Reading("all", batch.teacher, 1.0),
        Reading("some", batch.teacher, 1.0, rows=[1]),
        Reading("none", batch.teacher, 1.0, rows=[]),
    ]
    kept = PackedReader(model, head, batch, budget, 3)(rows)  # the same prompts, but not the same answers: all are read
    assert_close(kept["some"][1], kept["all"][1], **EXACT)
    assert not kept["some"][0].any() and not kept["none"].any()


def test_the_core_alone_makes_the_trainers_step(model):
    """A notebook's way: one process, whole tensors, no engine. Value and gradient are those of the trainer's step."""
    batch, m = batch_of(), replace(EVERYTHING, clip=0.5)
    value, gradient = whole_step(model, batch, m, micro=2)
    model.zero_grad()
    speak = lambda states, tau: (model.lm_head(states)[:, :VOCAB] / tau).log_softmax(-1)
    scores = score_teachers(read_plainly(model, speak, batch), batch, m)
    tokens = tokens_of(batch, scores, weigh(batch.mask, m, scores.contexts), m.clip)
    states = read(model, batch.student, batch.ids, batch.mask)
    with torch.no_grad():
        teacher = speak(scores.states, m.distill_temperature)
    loss, _ = objective(speak(states, m.distill_temperature), teacher, tokens, m)
    loss = loss + feature_matching(states, scores.states, tokens, m)[0]
    loss.backward()
    assert_close(loss.detach(), value, **EXACT)
    for name, p in model.named_parameters():
        assert_close(p.grad, gradient[name], **EXACT)


def test_a_scaled_loss_has_a_scaled_gradient_and_nothing_else():
    """What fp16 needs: 1,024 times the loss, 1,024 times the gradient, the same values for the log."""
    student, teacher, (weight, teacher_weight), tokens = uneven(9)
    student.requires_grad_()
    whole = lambda t: chunked_objective(student, Head(weight, 11), teacher, Head(teacher_weight, 11), t, EVERYTHING)
    (once, values), (much, same) = whole(tokens), whole(scaled(tokens, 1024.0))
    assert_close(much, 1024 * once, **EXACT)
    assert_close(torch.autograd.grad(much, student)[0], 1024 * torch.autograd.grad(once, student)[0], **EXACT)
    assert all(values[name].equal(same[name]) for name in values)
    assert scaled(tokens, 1.0) is tokens


# --- empty answers: nothing to learn from, and nothing to fall over ---------------------------------------------------


@pytest.mark.parametrize(
    "m",
    [
        EVERYTHING,
        Config(divergence="jsd", clip=0.3),
        Config(estimator="top-k", top_k=3),
        Config(w_div=0.0, w_match=1.0),
        Config(clip_quantile=0.5),
        Config(agreement="token", gamma=1.0, agreement_budget=0.5),
    ],
    ids=["everything", "jsd", "top-k", "match", "quantile", "budget"],
)
def test_a_micro_batch_of_empty_answers_adds_nothing(model, m):
    """Rows 2 and 3 are empty and a micro-batch of their own: loss, gradient and log are those of the other two."""
    batch = batch_of((5, 3, 0, 0))
    step, total, values = scored(model, batch, m), 0.0, []
    for rows, piece in token_slices(batch.mask, 2):
        part, each = step.loss(model, m, rows, piece)
        part.backward()
        total += part.detach()
        values.append(each)
    assert part == 0 and {k: v.shape for k, v in each.items()} == dict.fromkeys(values[0], (0,))
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    alone = Batch(
        *([x[:2] for x in (batch.student, batch.teacher, batch.negative)]),
        [c[:2] for c in batch.contexts],
        batch.ids[:2],
        batch.mask[:2],
    )
    budget = replace(m, agreement_budget=1.0)  # half of four is the two that are not empty
    loss, _ = scored(model, alone, budget).loss(model, budget)
    loss.backward()
    assert_close(total, loss.detach(), **EXACT)
    for n, p in model.named_parameters():
        assert_close(found[n], p.grad, **EXACT)


def test_contexts_of_empty_answers_only_leave_every_weight_at_one():
    """The random control may pick rows without a token: nothing was compared, which is no reason to end a run."""
    mask, m = torch.tensor([[1, 1], [0, 0]]), Config(agreement="token", gamma=1.0)
    weights = weigh(mask, m, torch.rand(3, 2, 2), compared=torch.zeros(2, 2))
    assert (weights.reliability == 1).all() and weights.share.sum() == 1


def test_an_empty_piece_is_measured_in_the_type_of_the_others():
    """In bf16 the first group of a pass may be all empty: what is kept of the next ones must not be rounded to its type."""
    head = Head(torch.rand(5, 4, dtype=torch.bfloat16), 5)
    states, ids = torch.rand(3, 4, dtype=torch.bfloat16), torch.tensor([0, 1, 2])
    full, none = sampled_logps(states, ids, head, 1.0, 0), sampled_logps(states[:0], ids[:0], head, 1.0, 0)
    assert full.dtype == none.dtype == torch.float32 and none.shape == (0,)


def test_a_term_of_ones_own_is_asked_for_even_beside_matching_alone():
    @dataclass
    class More(Mechanisms):
        w_own: float = 0.0

    student, teacher = torch.randn(4, 8).requires_grad_(), torch.randn(4, 8)
    head, tokens = Head(torch.randn(VOCAB, 8), VOCAB), Tokens(torch.tensor([1, 2, 3, 0]), *torch.ones(2, 4))
    asked = lambda m: "nll" in chunked_objective(student, head, teacher, head, tokens, m)[1]
    assert asked(More(w_div=0.0, w_match=1.0, w_own=0.1)) and not asked(More(w_div=0.0, w_match=1.0))
