"""The golden vectors: what the torch code computes, what check.py says about right ports, and what it says about wrong
ones: one deliberately broken port per trap.
"""

import functools
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "golden"))

import check
import make
from cases import OBJECTIVE

from engine.config import RECIPES
from unisd import Mechanisms

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
check.load = functools.cache(check.load)  # the vectors do not change while the tests run
NAMES = [path.name for path in sorted(GOLDEN.glob("*.json"))]


@pytest.fixture(scope="module")
def built():
    return make.build()


def differences(ours, theirs, where=""):
    """Paths at which two JSON values differ by more than 1e-12."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return [d for k in ours for d in differences(ours[k], theirs[k], f"{where}/{k}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [d for i, pair in enumerate(zip(ours, theirs, strict=True)) for d in differences(*pair, f"{where}/{i}")]
    if isinstance(ours, float) and isinstance(theirs, float):
        return [] if math.isclose(ours, theirs, rel_tol=1e-12, abs_tol=1e-12) else [f"{where}: {ours} is now {theirs}"]
    return [] if type(ours) is type(theirs) and ours == theirs else [f"{where}: {ours} is now {theirs}"]


@pytest.mark.parametrize("name", NAMES)
def test_the_vectors_are_what_the_torch_code_computes(name, built):
    refuse = lambda constant: pytest.fail(f"{constant} is no JSON")
    saved = json.loads((GOLDEN / name).read_text(), parse_constant=refuse)
    found = differences(saved, json.loads(json.dumps(built[name])), name)
    assert not found, f"run python tests/golden/make.py if this is meant: {found[0]} (and {len(found) - 1} more)"


def test_every_function_recipe_and_setting_has_vectors(built):
    assert sorted(built) == NAMES
    vectors = check.load()
    for module in ("losses", "agreement"):
        source = importlib.util.find_spec(module).origin
        assert set(re.findall(r"^def (\w+)\(", Path(source).read_text(), re.M)) <= {*vectors, "example"}
    objective = vectors["objective"]
    for recipe in RECIPES:
        assert any(case["case"].startswith(f"recipe {recipe},") for case in objective), recipe
    assert set(OBJECTIVE) >= set(Mechanisms.__dataclass_fields__) - {"log_entropy"}
    assert set(OBJECTIVE) == set(objective[0]["settings"]) - {"vocab", "rows"}
    readme = (GOLDEN / "README.md").read_text()
    for name, cases in vectors.items():
        assert f"`{name}(" in readme, f"{name} has no signature in the README"
        assert len({case["case"] for case in cases}) == len(cases), f"two cases of {name} have the same name"
        assert not any({"function", "case", "inputs", "settings", "outputs", "gradients"} - set(c) for c in cases)
    assert sum((GOLDEN / name).stat().st_size for name in NAMES) < 740_000


def test_what_must_be_equal_is_equal_in_the_vectors():
    loss = {case["case"]: case["outputs"]["loss"]["data"] for case in check.load()["objective"] if case["outputs"]}
    at = lambda start: next(v for k, v in loss.items() if k.startswith(start))
    assert at("everything, micro-batch of rows 0") + at("everything, micro-batch of row 2") == pytest.approx(
        at("everything, real head"), rel=1e-14
    )
    assert at("sequence weights, normalizer sequence") == pytest.approx(at("no weights, normalizer seq"), rel=1e-14)
    assert abs(at("sequence weights, normalizer batch") - at("recipe sd,")) > 1e-3
    assert at("the same with nan") == at("everything, identity head")
    assert at("top-k 100") == pytest.approx(at("recipe sd,"), rel=1e-12)
    assert at("teacher = student") == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("dtype, whole", [("float64", []), ("float32", ["reference"])])
def test_the_torch_code_itself_passes(capsys, dtype, whole):
    assert check.main(["losses", "agreement", "ema", "engine.rollout:completion_mask", *whole, "--dtype", dtype]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok   ") for line in lines)
    checked, wrapped = {line.split()[1].rstrip(":") for line in lines}, {"predicting_states", "head_logps", "objective"}
    assert checked == set(check.load()) - (set() if whole else wrapped)


def test_the_bf16_tolerance_is_what_the_torch_code_needs(capsys):
    able = "kl forward_kl reverse_kl jsd top_k_with_tail contrastive entropy feature_mse disagreement".split()
    targets = [f"reference:{name}" for name in [*able, "weighted_mean", "head_logps", "objective"]]
    assert check.main([*targets, "--dtype", "bfloat16"]) == 0
    assert check.main(["losses:jsd", "--dtype", "bfloat16", "--tolerance", "0.02"]) == 1  # it is not far too wide
    assert "FAIL jsd" in capsys.readouterr().out


# --- broken ports: (what is wrong) -> (the port, the vector, the start of the case that must catch it, what is off) ----


def within(name, other):
    """The source of a port that is the reference, but for one function that it calls."""
    module, attribute = name.rsplit(".", 1)
    source = f"def objective(*inputs, **s):\n    real, {module}.{attribute} = {module}.{attribute}, {other}\n"
    source += "    try:\n        return reference.objective(*inputs, **s)\n"
    return source + f"    finally:\n        {module}.{attribute} = real"


BROKEN = {
    "the KL reversed": (
        "def forward_kl(student, teacher): return losses.reverse_kl(student, teacher)",
        ("forward_kl", "two ordinary distributions: the direction", "value at [0, 0]: expected"),
    ),
    "-inf not replaced": ("def kl(p, q): return (p.exp() * (p - q)).sum(-1)", ("kl", "tokens that p rules out", "got nan")),
    "alpha as the student's share": (
        "def jsd(student, teacher, alpha): return losses.jsd(teacher, student, alpha)",
        ("jsd", "alpha 0.01: the teacher's share", "value at [0, 0]: expected"),
    ),
    "alpha 0 taken for a KL": (
        "def jsd(student, teacher, alpha):\n"
        "    return losses.jsd(student, teacher, alpha) if 0 < alpha < 1 else losses.forward_kl(student, teacher)",
        ("jsd", "alpha 0.0 is refused", "expected a ValueError that names 'alpha', nothing was raised"),
    ),
    "top-k without its tail": (
        "def top_k_with_tail(student, teacher, k):\n"
        "    return tuple(x[..., :-1] for x in losses.top_k_with_tail(student, teacher, k))",
        ("top_k_with_tail", "k 2", "student has shape (2, 3, 2), expected (2, 3, 3)"),
    ),
    "the sampled value alone": (
        "def sampled_reverse_kl(student, teacher): return student - teacher.detach()",
        ("sampled_reverse_kl", "the gradient is the value", "gradient of student at [0, 0]: expected"),
    ),
    "another subgradient at the hinge": (
        "def contrastive(student, positive, negative, margin):\n"
        "    positive, negative = positive.detach(), negative.detach()\n"
        "    return (margin + (student - positive).abs() - (student - negative).abs()).relu()",
        ("contrastive", "exactly at the hinge", "gradient of student at [0]: expected"),
    ),
    "no stop-gradient": (
        "def feature_mse(student, teacher): return (student - teacher).square().mean(-1)",
        ("feature_mse", "mean over H", "gradient of teacher at [0, 0, 0]: expected 0, got"),
    ),
    "sum over H": (
        "def feature_mse(student, teacher): return losses.feature_mse(student, teacher) * student.shape[-1]",
        ("feature_mse", "mean over H", "value at [0, 0]: expected"),
    ),
    "biased variance over tokens": (
        "def disagreement(logps, mask, level, stat):\n"
        "    biased = (len(logps) - 1) / len(logps) if (level, stat) == ('token', 'var') else 1\n"
        "    return agreement.disagreement(logps, mask, level, stat) * biased",
        ("disagreement", "token, K 2, variance (unbiased", "value at [0, 0]: expected"),
    ),
    "unbiased variance over sequences": (
        "def disagreement(logps, mask, level, stat):\n"
        "    unbiased = len(logps) / (len(logps) - 1) if (level, stat) == ('sequence', 'var') else 1\n"
        "    return agreement.disagreement(logps, mask, level, stat) * unbiased",
        ("disagreement", "sequence, K 2, variance (biased", "value at [0]: expected"),
    ),
    "a quantile without interpolation": (
        "def token_weights(delta, mask, gamma, quantile, cap, floor):\n"
        "    scale = delta[mask.bool()].quantile(quantile, interpolation='lower').clamp(min=1e-6)\n"
        "    w = (1 / (1 + gamma * (delta / scale).clamp(max=cap))).clamp(min=floor).detach()\n"
        "    return torch.where(mask.bool(), w, 1.0)",
        ("token_weights", "gamma 0.01", "value at [0, 0]: expected"),
    ),
    "a quantile over masked tokens too": (
        "def token_weights(delta, mask, gamma, quantile, cap, floor):\n"
        "    w = (1 / (1 + gamma * (delta / delta.quantile(quantile)).clamp(max=cap))).clamp(min=floor).detach()\n"
        "    return torch.where(mask.bool(), w, 1.0)",
        ("token_weights", "gamma 0.01", "value at [0, 0]: expected"),
    ),
    "the mean of sequence means": (
        "def weighted_mean(per_token, mask, weights, normalizer):\n"
        "    return agreement.weighted_mean(per_token, mask, weights, 'sequence')",
        ("weighted_mean", "batch: weights of 1", "value: expected"),
    ),
    "masked tokens multiplied by 0": (
        "def weighted_mean(per_token, mask, weights, normalizer):\n"
        "    return (agreement.coefficients(mask, weights, normalizer) * per_token).sum()",
        ("weighted_mean", "batch: masked tokens hold nan", "got nan"),
    ),
    "the EMA the wrong way round": (
        "def ema_update(shadow, student, decay):\n    return reference.ema_update(shadow, student, decay=1 - decay)",
        ("ema_update", "decay 0.9, one update from 0 towards 1", "shadows at [0, 0]: expected 0.1, got 0.9"),
    ),
    "the mask by the pad id": (
        "def completion_mask(ids, eos): return (ids != eos[0]).long()",
        ("completion_mask", "pad id = end id", "value at [0, 2]: expected 1, got 0"),
    ),
    "states shifted by one": (
        "def predicting_states(states, prompt_lengths, mask):\n"
        "    return reference.predicting_states(states, prompt_lengths + 1, mask)",
        ("predicting_states", "position i predicts token i + 1", "value at [0, 0]: expected"),
    ),
    "log-probabilities divided by the temperature": (
        "def head_logps(states, weight, bias, vocab, softcap, temperature):\n"
        "    return reference.head_logps(states, weight, bias, vocab=vocab, softcap=softcap, temperature=1.0) / temperature",
        ("head_logps", "temperature 0.7 divides the logits", "value at [0, 0]: expected"),
    ),
    "mass on the padded vocabulary": (
        "def head_logps(states, weight, bias, vocab, softcap, temperature):\n"
        "    s = dict(vocab=len(weight), softcap=softcap, temperature=temperature)\n"
        "    return reference.head_logps(states, weight, bias, **s)[:, :vocab]",
        ("head_logps", "padded vocabulary", "value at [0, 0]: expected"),
    ),
    "the clip after the weights": (
        "def objective(*inputs, **s):\n"
        "    out, mask = reference.objective(*inputs, **s), inputs[5]\n"
        "    if s['clip'] and s['agreement'] == 'token' and not s['w_contrast']:\n"
        "        mw = out['weights'] * mask\n"
        "        out['loss'] = (mw * out['div']).clamp(max=s['clip']).sum() / mw.sum()\n"
        "    return out",
        ("objective", "clip 0.8 touches some tokens: first the clip", "loss: expected"),
    ),
    "a denominator per micro-batch": (
        "def objective(student, teacher, negative, contexts, ids, mask, head, teacher_head, *, rows, **s):\n"
        "    b = slice(*rows) if rows else slice(None)\n"
        "    part = lambda x, at=0: x if x is None else x[:, b] if at else x[b]\n"
        "    views = part(student), part(teacher), part(negative), part(contexts, 1), part(ids), part(mask)\n"
        "    return reference.objective(*views, head, teacher_head, rows=None, **s)['loss']",
        ("objective", "everything, micro-batch of rows 0 and 1", "loss: expected"),
    ),
    "the loss at the contexts' temperature": (
        "def objective(*inputs, **s):\n"
        "    return reference.objective(*inputs, **s | dict(distill_temperature=s['agreement_temperature']))",
        ("objective", "distill temperature 0.7", "loss: expected"),
    ),
}
SURVIVED = {  # a port with one of these once passed all vectors; so only the case that was added for it is asked
    "a cap of 5": (
        within("agreement.token_weights", "functools.partial(agreement.token_weights, cap=5.0)"),
        ("objective", "one token far beyond the quantile", "loss: expected"),
    ),
    "a cap of 20": (
        within("agreement.token_weights", "functools.partial(agreement.token_weights, cap=20.0)"),
        ("objective", "one token far beyond the quantile", "loss: expected"),
    ),
    "a floor of 0.05": (
        within("agreement.token_weights", "functools.partial(agreement.token_weights, floor=0.05)"),
        ("objective", "one token far beyond the quantile", "loss: expected"),
    ),
    "the clip of w_div D": (
        "def objective(*inputs, **s):\n"
        "    return reference.objective(*inputs, **s | dict(clip=s['clip'] / s['w_div'] if s['w_div'] else s['clip']))",
        ("objective", "clip 0.8 of D, not of w_div D", "loss: expected"),
    ),
    "a first row that always has a token": (
        "def objective(*inputs, **s):\n"
        "    mask = inputs[5].clone()\n"
        "    mask[0, 0] |= mask.any()\n"
        "    return reference.objective(*inputs[:5], mask, *inputs[6:], **s)",
        ("objective", "budget 0.5, a row without tokens, first", "loss: expected"),
    ),
    "a last row that ends where the next one would begin": (
        "def predicting_states(states, prompt_lengths, mask):\n"
        "    ends = mask.sum(1).cumsum(0)\n"
        "    found = reference.predicting_states(states, prompt_lengths, mask)\n"
        "    return found[: ends[-1] - 1] if ends[-1] == ends[-2] else found",
        ("predicting_states", "a row without tokens, the last", "value has shape"),
    ),
    "a first row that begins where its first token is": (
        "def disagreement(logps, mask, level, stat):\n"
        "    mask = torch.cat([mask[:1].clamp(min=int(mask[0].sum() == 0)), mask[1:]])\n"
        "    return agreement.disagreement(logps, mask, level, stat)",
        ("disagreement", "sequence: one without tokens, the first", "value at [0]: expected 0"),
    ),
    "B without the rows that have no token": (
        "def coefficients(mask, weights, normalizer):\n"
        "    kept = mask.any(1) if mask[[0, -1]].any(1).logical_not().any() else mask.any(1) | True\n"
        "    out = torch.zeros_like(weights)\n"
        "    out[kept] = agreement.coefficients(mask[kept], weights[kept], normalizer)\n"
        "    return out",
        ("coefficients", "sequence: a sequence without tokens, the first", "value at"),
    ),
    "rounded up over the rows that have tokens": (
        "def objective(*inputs, **s):\n"
        "    rows = inputs[5].any(1)\n"
        "    budget = math.ceil(s['agreement_budget'] * int(rows.sum())) / len(rows) if s['agreement_budget'] < 1 else 1\n"
        "    return reference.objective(*inputs, **s | dict(agreement_budget=budget - 1e-9 * (budget < 1)))",
        ("objective", "budget 0.5, a row without tokens, first", "loss: expected"),
    ),
    "rounded up after a guard against rounding": (
        within("math.ceil", "lambda x, up=math.ceil: up(x - 1e-9)"),
        ("objective", "budget 0.28 of 25 rows", "loss: expected"),
    ),
    "uncertainty below the quantile ceiling": (
        within(
            "train.uncertainty",
            "lambda reader, scores, cfg, before, ranks, real=train.uncertainty: real(reader, scores, cfg, before.clamp("
            "max=losses.quantile_ceiling(before, reader.batch.mask, cfg.clip_quantile)) if cfg.clip_quantile else before, ranks)",
        ),
        ("objective", "budget 0.5, quantile ceiling", "loss: expected"),
    ),
    "uncertainty of the whole vocabulary under top-k": (
        within(
            "train.divergence_before",
            "lambda reader, scores, cfg, real=train.divergence_before: real(reader, scores, "
            "dataclasses.replace(cfg, estimator='full' if cfg.estimator == 'top-k' else cfg.estimator))",
        ),
        ("objective", "budget 0.5, top-k 2", "loss: expected"),
    ),
    "0/0 where all weights are 0": (
        "def coefficients(mask, weights, normalizer):\n"
        "    c = agreement.coefficients(mask, weights, normalizer)\n"
        "    return c if normalizer == 'sequence' or (mask * weights.nan_to_num()).any() else c / 0",
        ("coefficients", "batch: weights that all underflowed", "got nan"),
    ),
    "the static ceiling wins": (
        "def objective(*inputs, **s):\n"
        "    return reference.objective(*inputs, **s | dict(clip_quantile=0 if s['clip'] else s['clip_quantile']))",
        ("objective", "two ceilings are refused", "nothing was raised"),
    ),
    "a sampled forward KL": (
        "def objective(*inputs, **s):\n"
        "    return reference.objective(*inputs, **s | (dict(divergence='reverse') if s['estimator'] == 'sampled' else {}))",
        ("objective", "the sampled estimator of forward is refused", "nothing was raised"),
    ),
    "no temperature where the head is real": (
        "def objective(*inputs, **s):\n"
        "    return reference.objective(*inputs, **s | (dict(distill_temperature=1.0) if inputs[6] is not None else {}))",
        ("objective", "distill temperature 0.5 through real heads", "loss: expected"),
    ),
    "no temperature of the contexts where the head is real": (
        "def objective(*inputs, **s):\n"
        "    return reference.objective(*inputs, **s | (dict(agreement_temperature=1.0) if inputs[6] is not None else {}))",
        ("objective", "agreement temperature 0.5 through real heads", "loss: expected"),
    ),
    "B of the micro-batch": (
        "def objective(*inputs, **s):\n"
        "    (i, j), one = s['rows'] or (0, len(inputs[5])), s['normalizer'] == 'sequence'\n"
        "    return reference.objective(*inputs, **s)['loss'] * (len(inputs[5]) / (j - i) if one else 1)",
        ("objective", "micro-batch of row 0, normalizer sequence", "loss: expected"),
    ),
    "rows to read chosen within the micro-batch": (
        within(
            "train.least_certain",
            "lambda x, budget, ranks, real=train.least_certain: real(x[slice(*s['rows'])] if s['rows'] else x, budget, ranks)",
        ),
        ("objective", "budget 0.5, micro-batch of row 0", "loss: expected"),
    ),
    "a micro-batch without tokens refused": (
        "def objective(*inputs, **s):\n"
        "    agreement.coefficients(inputs[5][slice(*s['rows'] or [None])], torch.ones(()), 'batch')\n"
        "    return reference.objective(*inputs, **s)",
        ("objective", "micro-batch without tokens", "ValueError: every token is masked"),
    ),
    "normalizer batch for all but the divergence": (
        "def objective(*inputs, **s):\n"
        "    return reference.objective(*inputs, **s if s['w_div'] else s | dict(normalizer='batch'))",
        ("objective", "cross-entropy alone, normalizer sequence", "loss: expected"),
    ),
    "the teacher asked for the divergence only": (
        "def objective(student, teacher, *inputs, **s):\n"
        "    return reference.objective(student, teacher if s['w_div'] else None, *inputs, **s)",
        ("objective", "contrast without a divergence", "loss: expected 1.12011"),
    ),
    "variance whatever stat is, over sequences": (
        within(
            "agreement.disagreement",
            "lambda x, m, level, stat, f=agreement.disagreement: f(x, m, level, 'var' if level == 'sequence' else stat)",
        ),
        ("objective", "sequence agreement by range", "loss: expected"),
    ),
    "a floor of 0": (
        within("agreement.token_weights", "functools.partial(agreement.token_weights, floor=0.0)"),
        ("objective", "token weights, gamma 1000", "loss: expected"),
    ),
    "a floor of 0.015": (
        within("agreement.token_weights", "functools.partial(agreement.token_weights, floor=0.015)"),
        ("objective", "token weights, gamma 1000", "loss: expected"),
    ),
    "a softmax without its maximum": (
        within("torch.Tensor.log_softmax", "lambda x, dim: x - x.exp().sum(dim, keepdim=True).log()"),
        ("objective", "logits of 1000", "loss: expected 3.8561"),
    ),
    "alpha 0.5 under top-k": (
        "def objective(*inputs, **s):\n"
        "    return reference.objective(*inputs, **s | (dict(alpha=0.5) if s['estimator'] == 'top-k' else {}))",
        ("objective", "jsd, alpha 0.3, top-k 1", "loss: expected"),
    ),
    "a quantile ceiling below 0": (
        within("train.quantile_ceiling", "lambda x, mask, q: x[mask.bool()].quantile(q)"),
        ("objective", "the sampled estimator below 0 throughout", "loss: expected"),
    ),
    "a quantile ceiling of what is above 0": (
        within("train.quantile_ceiling", "lambda x, mask, q: losses.quantile_ceiling(x.clamp(min=0.0), mask, q)"),
        ("objective", "the sampled estimator, -1 and 1", "loss: expected"),
    ),
    "a quantile ceiling of |D|": (
        "def quantile_ceiling(per_token, mask, q): return losses.quantile_ceiling(per_token.abs(), mask, q)",
        ("quantile_ceiling", "a sampled divergence of -3", "value: expected 1, got 3"),
    ),
    "a mixture of probabilities": (
        "def jsd(student, teacher, alpha):\n"
        "    m = ((1 - alpha) * student.exp() + alpha * teacher.exp()).log()\n"
        "    return alpha * losses.kl(teacher, m) + (1 - alpha) * losses.kl(student, m)",
        ("jsd", "probabilities of e^-800 and e^-900", "value: expected 0, got nan"),
    ),
    "log-probabilities clamped": (
        "def kl(p, q): return losses.kl(p.clamp(min=-100.0), q.clamp(min=-100.0))",
        ("kl", "q 200 nats down", "value: expected"),
    ),
    "a tail of probabilities": (
        "def top_k_with_tail(student, teacher, k):\n"
        "    top = teacher.topk(k).indices\n"
        "    tail = lambda x: x.exp().scatter(-1, top, 0.0).sum(-1, keepdim=True).log().clamp(min=-1e30)\n"
        "    return tuple(torch.cat([x.gather(-1, top), tail(x)], -1) for x in (student, teacher))",
        ("top_k_with_tail", "a tail of e^-800", "student at [1]: expected -800"),
    ),
    "a sum that is never below 1e-8": (
        "def coefficients(mask, weights, normalizer): return mask * weights / (mask * weights).sum().clamp(min=1e-8)",
        ("coefficients", "batch: weights of 1e-12", "value at [0, 0]: expected 0.25"),
    ),
    "a scale with 1e-12 added": (
        "def token_weights(delta, mask, gamma, quantile, cap, floor):\n"
        "    scale = delta[mask.bool()].quantile(quantile) + 1e-12\n"
        "    return (1 / (1 + gamma * (delta / scale).clamp(max=cap))).clamp(min=floor)",
        ("token_weights", "disagreements below 1e-6", "value at [0, 0]: expected"),
    ),
    "E[x^2] - E[x]^2": (
        "def disagreement(logps, mask, level, stat):\n"
        "    return (logps.square().mean(0) - logps.mean(0).square()) * (len(logps) / (len(logps) - 1))",
        ("disagreement", "float32: the mean is subtracted", "value at [0, 0]: expected"),
        *("--dtype", "float32"),
    ),
    "a decay of exactly 1 only": (
        "def half_life(decay, every):\n"
        "    return math.inf if decay == 1 else 0.0 if decay == 0 else every * math.log(0.5) / math.log(decay)",
        ("half_life", "decay 1.5 every 1", "value: expected inf"),
    ),
    "an input changed in place": (
        "def predicting_states(states, prompt_lengths, mask):\n"
        "    prompt_lengths -= 1\n"
        "    return reference.predicting_states(states, prompt_lengths + 1, mask)",
        ("predicting_states", "position i predicts token i + 1", "the input prompt_lengths was changed in place"),
    ),
}


def write_port(
    folder, name, source, imports="import dataclasses, functools, math, torch\nimport agreement, losses, reference, train\n"
):
    (folder / f"{name}.py").write_text(imports + source + "\n")


@pytest.mark.parametrize("what", BROKEN | SURVIVED)
def test_a_broken_port_is_caught_where_it_is_broken(what, tmp_path, monkeypatch, capsys):
    source, (function, case, difference), *more = (BROKEN | SURVIVED)[what]
    module = "broken_" + re.sub(r"\W", "_", what)
    write_port(tmp_path, module, source)
    monkeypatch.syspath_prepend(tmp_path)
    assert check.main([module] if what in BROKEN else [module, "--case", f"^{re.escape(case)}", *more]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"FAIL {function}: case ") and difference in line, line
    assert f"case '{case}" in line or f'case "{case}' in line, line


def test_ports_in_numpy_under_other_names_and_with_the_loss_alone(tmp_path, monkeypatch, capsys):
    numpy = (
        "def my_kl(a, b):\n"
        "    keep = a > -np.inf\n"
        "    return (np.exp(a) * (np.where(keep, a, 0) - np.where(keep, b, 0))).sum(-1)\n"
        "def forward_kl(student, teacher): return my_kl(teacher, student)\n"
        "def half_life(decay, every):\n"
        "    return np.inf if decay >= 1 else every * np.log(0.5) / np.log(decay) if decay > 0 else 0.0"
    )
    write_port(tmp_path, "numpy_port", numpy, "import numpy as np\n")
    write_port(tmp_path, "loss_only", "def objective(*inputs, **s): return reference.objective(*inputs, **s)['loss']")
    monkeypatch.syspath_prepend(tmp_path)
    assert check.main(["numpy_port", "numpy_port:my_kl=kl"]) == 0
    assert check.main(["loss_only", "--case", "recipe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["ok   kl", "ok   forward_kl", "ok   half_life", "ok   objective"]
    assert all(float(re.search(r"gradients (\S+)", line)[1]) < 1e-6 for line in lines[:2])  # central differences
    assert float(re.search(r"gradients (\S+)", lines[3])[1]) < 1e-14  # 0 where the vectors were made
    assert check.main(["numpy_port:my_kl=reverse_kl", "--case", "ordinary"]) == 0
    assert ": 1 case," in capsys.readouterr().out
    assert check.main(["numpy_port:my_kl=forward_kl"]) == 1
    add = "def coefficients(mask, weights, normalizer):\n    weights /= (weights * mask).sum()\n    return weights * mask"
    write_port(tmp_path, "in_place_port", add, "import numpy as np\n")
    assert check.main(["in_place_port", "--case", "batch: weights of 1$"]) == 1
    assert "the input weights was changed in place" in capsys.readouterr().out
    once = "found = {}\ndef feature_mse(student, teacher):\n"
    once += "    return found.setdefault(student.shape + teacher[0, 0, 0].shape + (student[1, 1, 1] - teacher[1, 1, 1] == 0,),"
    once += " ((student - teacher) ** 2).mean(-1))"
    write_port(tmp_path, "constant_port", once, "import numpy as np\n")
    assert check.main(["constant_port"]) == 1 and "gradient of student at [0, 0, 0]" in capsys.readouterr().out
    assert check.main(["constant_port", "--no-gradients"]) == 0


@pytest.mark.parametrize(
    "argv, says",
    [
        (["no_such_module"], "cannot be imported"),
        (["./losses"], "without .py or a path"),
        (["losses.py"], "without .py or a path"),
        (["losses", "--case", "["], "--case '[' is no regular expression"),
        (["losses:no_such_function"], "has no 'no_such_function'"),
        (["losses:kl=no_such_vector"], "there is no vector 'no_such_vector'"),
        (["math"], "no function named like a vector"),
        (["losses", "--case", "no such case"], "no case matches"),
        ([], "usage:"),
        (["losses", "--dtype", "float16"], "invalid choice"),
        (["losses", "--arrays", "numpy", "--dtype", "bfloat16"], "numpy has no bfloat16"),
    ],
)
def test_a_command_that_makes_no_sense_exits_with_2(argv, says, capsys):
    try:
        code = check.main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and says in capsys.readouterr().err


def test_what_a_porter_is_told(tmp_path, monkeypatch, capsys):
    write_port(tmp_path, "broken_port", "def kl(p, q) return p")
    source = "def forwrad_kl(student, teacher): return losses.forward_kl(student, teacher)\n"
    source += "def entropy(logps):\n    return logps[..., 9]\n"
    source += "def objective(*inputs, **s):\n    out = reference.objective(*inputs, **s)\n"
    source += "    return out | dict(loss=out['loss'] * 2, div=out['div'] + 1) if 'div' in out else out\n"
    write_port(tmp_path, "some_port", source)
    monkeypatch.syspath_prepend(tmp_path)
    assert check.main(["broken_port"]) == 2 and "SyntaxError" in capsys.readouterr().err
    assert check.main(["some_port"]) == 1
    said = capsys.readouterr()
    assert "some_port has 2 of 23 functions" in said.err and "forward_kl (but 'forwrad_kl')" in said.err
    entropy, objective = said.out.splitlines()
    assert "IndexError" in entropy and "(some_port.py, line 5) [3 of 3 cases failed]" in entropy
    assert "; div at [0, 0]: expected" in objective and "loss: expected" in objective


def test_the_folder_needs_numpy_and_nothing_else_of_the_repository(tmp_path):
    for path in [GOLDEN / "check.py", *GOLDEN.glob("*.json")]:
        shutil.copy(path, tmp_path)
    write_port(
        tmp_path, "port", "def entropy(l): return -(np.exp(l) * np.where(l > -np.inf, l, 0)).sum(-1)", "import numpy as np\n"
    )
    run = lambda *argv: subprocess.run([sys.executable, "check.py", *argv], cwd=tmp_path, capture_output=True, text=True)
    good, bad = run("port"), run("port:entropy=token_logps")
    assert (good.returncode, good.stdout[:17]) == (0, "ok   entropy: 3 c"), good.stderr
    assert bad.returncode == 1 and bad.stdout.startswith("FAIL token_logps: case 'the written token")


# A part of it, because JAX compiles every operation for every shape; all: python tests/golden/check.py ports.jax_unisd
UNDER_JAX = """
import functools, sys
sys.path[:0] = ["tests/golden", "."]
import check
vectors, port = check.load(), lambda names: ["ports.jax_unisd:" + name for name in names]
steep = "sampled_reverse_kl clip_tokens contrastive feature_mse weighted_mean".split()
failed = check.main([*port(vectors.keys() - {"objective", *steep}), "--no-gradients", "--case", "^(?!.*(K [245]|k [45]))"])
failed += check.main(port(steep))
some = "^everything, identity head|with nan|clip at the 0.7|sampled estimator, clip|highest divergence|masked is refused"
failed += check.main([*port(["objective"]), "--case", some])
import jax
from ports.jax_unisd import objective
case = next(c for c in vectors["objective"] if c["case"] == "everything, identity head")
inputs = [None if x is None else jax.numpy.asarray(check.decode(x)) for x in case["inputs"].values()]
loss = jax.jit(functools.partial(objective, **case["settings"]))(*inputs)["loss"]
assert abs(loss - case["outputs"]["loss"]["data"]) < 1e-12
sys.exit(failed)
"""


@pytest.mark.slow
def test_the_jax_port_passes_and_compiles():
    pytest.importorskip("jax")
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    # In a process of its own: JAX starts threads, and the tests of the sandbox fork.
    argv = [sys.executable, "-c", UNDER_JAX]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=os.environ | quick)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[1].rstrip(":") for line in done.stdout.splitlines()} == set(check.load())
    assert re.search(r"objective: 6 cases.*, gradients \d", done.stdout)
