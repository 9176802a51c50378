"""cases.py - which inputs the vectors hold, and what each is there to catch.

What: a list of cases per file. Numbers come from Python's own generator, seeded by a name, so that they do not depend on
any library's version. make.py evaluates them with the torch code.
Depends on torch and config.py (for the recipes).   Try it:  python tests/golden/make.py
Shapes: B sequences, T completion tokens, V vocabulary, H hidden size, K contexts, N unmasked tokens, L row length.
"""

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.config import PRESET_RECIPES, Config, make
from engine.rollout import completion_mask
from unisd import RECIPES, Mechanisms


@dataclass
class Case:
    function: str
    name: str  # what it is there to catch
    inputs: dict  # name -> tensor or None, in the order of the signature
    gradients: str = ""  # inputs whose gradient is recorded
    settings: dict = field(default_factory=dict)
    refuses: str = ""  # the name that the error must mention; "" = no error
    note: str = ""


class Numbers:
    """Inputs with few digits, so that they read well: uniform, seeded by a name."""

    def __init__(self, name: str):
        self.source = random.Random(name)

    def uniform(self, *shape: int, low: float = -2.0, high: float = 2.0) -> Tensor:
        flat = [round(self.source.uniform(low, high), 2) for _ in range(math.prod(shape))]
        return torch.tensor(flat, dtype=torch.float64).reshape(shape)

    def logps(self, *shape: int, width: float = 2.0) -> Tensor:
        """Log-probabilities over the last axis."""
        return self.uniform(*shape, low=-width, high=width).log_softmax(-1)

    def ids(self, *shape: int, high: int) -> Tensor:
        return torch.tensor([self.source.randrange(high) for _ in range(math.prod(shape))]).reshape(shape)


def f(*rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


INF, NAN = math.inf, math.nan
HALF, QUARTER = math.log(0.5), math.log(0.25)
RAGGED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])  # (B, T), 11 unmasked tokens
GAP = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])  # a sequence without tokens
GAPS = {"first": GAP[[1, 0, 2]], "last": GAP[[0, 2, 1]]}  # the same at an end, where sums over segments go wrong
OFF = RAGGED == 0
FEW = [HALF, HALF, -INF, -INF, -INF], [QUARTER, QUARTER, HALF, -INF, -INF]  # distributions that rule tokens out


def divergences() -> list[Case]:
    """kl, forward_kl, reverse_kl, jsd: two distributions each."""
    out, shape = [], (2, 3, 5)
    # What `few` allows, `more` allows too, but not the other way round.
    more = [HALF, QUARTER, QUARTER, -INF, -INF], [QUARTER, QUARTER, math.log(0.375), math.log(0.125), -INF]
    few, more = f([*FEW, FEW[0]], [*FEW, FEW[1]]), f([*more, more[0]], [*more, more[1]])
    for function, a, b in (
        ("kl", "p", "q"),
        ("forward_kl", "student", "teacher"),
        ("reverse_kl", "student", "teacher"),
        ("jsd", "student", "teacher"),
    ):
        grad = f"{a} {b}" if function == "kl" else a

        def add(name, x, y, grad=grad, refuses="", names=(a, b), function=function, alpha=0.5):
            settings = {"alpha": alpha} if function == "jsd" else {}
            out.append(Case(function, name, dict(zip(names, (x, y), strict=True)), grad, settings, refuses))

        n = Numbers(function)
        x, y, peaked = n.logps(*shape), n.logps(*shape), n.logps(*shape, width=30.0)
        add("two ordinary distributions: the direction shows", x, y)
        add("equal distributions: 0", x, x)
        add(f"{a} is nearly certain: small probabilities, large log-ratios", peaked, y)
        if function == "forward_kl":
            add("tokens that the teacher rules out add exactly 0, value and gradient", more, few)
            add("the teacher allows what the student rules out: inf", few, more, grad="")
        else:
            add(f"tokens that {a} rules out add exactly 0, value and gradient", few, more)
        if function in ("kl", "reverse_kl"):
            add(f"{a} allows what {b} rules out: inf", more, few, grad="")
        if function == "kl":
            add("q 200 nats down: no log-probability is clamped", f(HALF, HALF), f(0.0, -200.0))
        if function == "jsd":
            add("probabilities of e^-800 and e^-900: the mixture is a logaddexp", f(0.0, -800.0), f(0.0, -900.0))
            for alpha in (0.01, 0.3, 0.99):
                add(f"alpha {alpha}: the teacher's share of the mixture", x, y, alpha=alpha)
            add("nothing in common: ln 2, the largest value", f([0.0, *[-INF] * 4]), f([-INF, HALF, HALF, -INF, -INF]))
            for alpha in (0.0, 1.0, -0.1, 1.5):
                add(f"alpha {alpha} is refused: not strictly between 0 and 1", x, y, "", "alpha", alpha=alpha)
    return out


def other_losses() -> list[Case]:
    out, (B, T, V) = [], (2, 3, 5)

    def add(function, name, inputs, grad="", **settings):
        out.append(Case(function, name, inputs, grad, settings))

    n = Numbers("token_logps")
    few = f(*FEW)
    logps = n.logps(B, T, V)
    add("token_logps", "the written token of each position", dict(logps=logps, ids=n.ids(B, T, high=V)), "logps")
    add("token_logps", "a token that is ruled out is -inf", dict(logps=few, ids=torch.tensor([1, 3])), "logps")

    n = Numbers("top-k")
    both = dict(student=n.logps(B, T, V), teacher=n.logps(B, T, V))
    assert (both["teacher"].sort(-1).values.diff() > 0).all(), "a tie: its order would be the library's"
    add("top_k_with_tail", "k 2: the teacher's likeliest, likeliest first, then the tail", both, "student", k=2)
    add("top_k_with_tail", "k 4: the tail is one token", both, "student", k=4)
    add("top_k_with_tail", "k 5, the whole vocabulary: an empty tail of -1e30", both, "student", k=5)
    add("top_k_with_tail", "k above the vocabulary: as if k = V", both, "student", k=100)
    sure = [math.log(0.6), -INF, math.log(0.3), math.log(0.1), -INF]
    both = dict(student=n.logps(B, T, V), teacher=f([sure] * T, [sure] * T))
    add("top_k_with_tail", "tokens that the teacher rules out lie in the tail", both, "student", k=2)
    add("top_k_with_tail", "k 3: a tail of -inf only is -1e30, as an empty one", both, "student", k=3)
    sure = [-1e-14, -33.0, -34.0, -35.0, -36.0]
    both = dict(student=n.logps(B, T, V, width=30.0), teacher=f([sure] * T, [sure] * T))
    add("top_k_with_tail", "nearly all mass in the head: the tail is summed, not 1 - head", both, "student", k=2)

    tiny = f(0.0, -800.0, -900.0)
    add("top_k_with_tail", "a tail of e^-800 and e^-900: logsumexp subtracts its maximum", dict(student=tiny, teacher=tiny), k=1)

    n = Numbers("sampled_reverse_kl")
    student, teacher = n.uniform(B, T, low=-4.0, high=0.0), n.uniform(B, T, low=-4.0, high=0.0)
    both, same = dict(student=student, teacher=teacher), dict(student=student, teacher=student)
    add("sampled_reverse_kl", "the gradient is the value times grad log p_student", both, "student teacher")
    add("sampled_reverse_kl", "equal: value 0 and gradient 0", same, "student teacher")

    D = dict(per_token=f([0.1, 0.7, 2.5], [0.5, 12.0, 0.0]))
    add("clip_tokens", "null: no clipping", D, "per_token", ceiling=None)
    add("clip_tokens", "ceiling 0.6 touches some tokens: their gradient is 0", D, "per_token", ceiling=0.6)
    add("clip_tokens", "ceiling 1e-6 touches nearly all", D, "per_token", ceiling=1e-6)
    add("clip_tokens", "ceiling 100 touches none", D, "per_token", ceiling=100.0)
    add("clip_tokens", "a token exactly at the ceiling keeps its gradient of 1", D, "per_token", ceiling=0.5)

    D = Numbers("quantile_ceiling").uniform(3, 5, low=0.0, high=3.0)
    given = dict(per_token=D, mask=RAGGED)
    for q in (0.0, 0.5, 0.9, 0.95, 1.0):
        add("quantile_ceiling", f"q {q} over 11 tokens: linear interpolation, no gradient", given, "per_token", q=q)
    rubbish = dict(per_token=D.masked_fill(OFF, INF), mask=RAGGED)
    add("quantile_ceiling", "masked tokens hold inf and do not count", rubbish, "per_token", q=0.8)
    add("quantile_ceiling", "all 0: never below 1e-6", dict(per_token=D * 0, mask=RAGGED), "per_token", q=0.9)
    below = dict(per_token=f([-3.0, 1.0]), mask=torch.tensor([[1, 1]]))
    add("quantile_ceiling", "a sampled divergence of -3: the quantile of D, not of |D|", below, "per_token", q=1.0)

    n, three = Numbers("contrastive"), "student positive negative"
    given = {k: n.uniform(B, T, low=-4.0, high=0.0) for k in three.split()}
    for margin in (0.0, 0.5, 3.0):
        add("contrastive", f"margin {margin}: only the student has a gradient", given, three, margin=margin)
    edges = {  # student, positive, negative
        "same side of both teachers: gradient 0 where the value is not": (-3.0, -1.0, -0.5),
        "the negative is far away: value 0 and gradient 0": (-1.0, -1.25, -6.0),
        "student = positive: the subgradient of |x| at 0 is 0": (-1.0, -1.0, -1.25),
        "student = negative: the subgradient of |x| at 0 is 0": (-1.0, -1.25, -1.0),
        "exactly at the hinge, 0.5 + 0.25 - 0.75: value 0, and the gradient passes": (-1.0, -1.25, -0.25),
    }
    for name, numbers in edges.items():
        add("contrastive", name, {k: f(x) for k, x in zip(given, numbers, strict=True)}, three, margin=0.5)

    n = Numbers("feature_mse")
    student, teacher = n.uniform(B, T, 4), n.uniform(B, T, 4)
    both, same = dict(student=student, teacher=teacher), dict(student=student, teacher=student)
    add("feature_mse", "mean over H, not the sum; no gradient to the teacher", both, "student teacher")
    add("feature_mse", "equal states: 0", same, "student teacher")

    add("entropy", "ordinary distributions", dict(logps=Numbers("entropy").logps(B, T, V)), "logps")
    add("entropy", "ruled-out tokens add exactly 0", dict(logps=few), "logps")
    add("entropy", "uniform: ln V; certain: 0", dict(logps=f([-math.log(5)] * 5, [0.0] + [-INF] * 4)), "logps")
    return out


def disagreement() -> list[Case]:
    out, readings = [], Numbers("disagreement").uniform(5, 3, 5, low=-5.0, high=0.0)

    def add(name, K, level, stat, mask=RAGGED, refuses="", logps=readings):
        grad = "logps" if K == 3 and logps is readings else ""  # a stop-gradient does not depend on K
        given = dict(logps=logps[:K], mask=mask)
        out.append(Case("disagreement", name, given, grad, dict(level=level, stat=stat), refuses))

    rubbish = readings.masked_fill(OFF, NAN)
    rubbish[1::2] = rubbish[1::2].nan_to_num(INF)
    for level, how in (("token", "unbiased, over K - 1"), ("sequence", "biased, over K")):
        for K in (2, 3, 4, 5):
            add(f"{level}, K {K}, variance ({how})", K, level, "var")
            add(f"{level}, K {K}, range", K, level, "range")
        add(f"{level}, K 1, range: 0", 1, level, "range")
        add(f"{level}, K 1, variance is refused", 1, level, "var", refuses="stat")
        add(f"{level}: masked positions hold nan and inf and do not count", 3, level, "var", logps=rubbish)
    add("sequence: one without tokens has 0", 3, "sequence", "var", GAP)
    for place, mask in GAPS.items():
        add(f"sequence: one without tokens, the {place}", 3, "sequence", "var", mask)
    close, one = f([[-64.0]], [[-64.03125]]), torch.tensor([[1]])
    add("float32: the mean is subtracted, then squared; E[x^2] - E[x]^2 cancels", 2, "token", "var", one, logps=close)
    add("an unknown level is refused", 2, "word", "var", refuses="level")
    add("an unknown stat is refused", 2, "token", "std", refuses="stat")
    return out


def weights() -> list[Case]:
    out, n = [], Numbers("weights")
    delta = n.uniform(3, 5, low=0.0, high=2.0)
    spike = delta.clone()
    spike[0, 2] = 500.0
    even = RAGGED.clone()
    even[1, 2] = 1  # 12 tokens: the median lies between two

    def add(name, gamma, delta=delta, mask=RAGGED, refuses="", quantile=0.95, cap=10.0, floor=0.01):
        settings = dict(gamma=gamma, quantile=quantile, cap=cap, floor=floor)
        grad = "" if refuses or not delta.isfinite().all() else "delta"
        out.append(Case("token_weights", name, dict(delta=delta, mask=mask), grad, settings, refuses))

    for gamma in (0.0, 0.01, 1.0):
        add(f"gamma {gamma}: in (0, 1], and 1 where masked", gamma)
    add("gamma 1000: the floor acts", 1000.0)
    add("quantile 0.5 of 12 values: halfway between two", 1.0, mask=even, quantile=0.5)
    add("a spike: the cap acts", 0.5, spike, quantile=0.5)
    add("another quantile, cap and floor", 2.0, quantile=0.8, cap=0.5, floor=0.6)
    add("no disagreement: the scale is never below 1e-6, every weight is 1", 1.0, delta * 0)
    add("masked tokens hold nan and do not count", 1.0, delta.masked_fill(OFF, NAN))
    add("one token is its own quantile", 1.0, f([0.7]), torch.tensor([[1]]))
    add("disagreements below 1e-6: the scale is the larger of the two, not the sum", 1.0, f([1e-7, 2e-7]), torch.tensor([[1, 1]]))
    add("every token masked is refused", 1.0, mask=RAGGED * 0, refuses="mask")
    for gamma in (0.0, 0.01, 1.0, 20.0):
        out.append(Case("sequence_weights", f"gamma {gamma}", dict(delta=f(0.0, 0.3, 2.5)), "delta", dict(gamma=gamma)))
    return out


def means() -> list[Case]:
    """coefficients and weighted_mean, on the same inputs."""
    out, n = [], Numbers("means")
    some, D = n.uniform(3, 5, low=0.1, high=1.0), n.uniform(3, 5, low=0.0, high=3.0)
    ones, per_row = torch.ones_like(some), f([0.5], [0.9], [0.2]).expand(3, 5).contiguous()

    def add(function, name, normalizer, mask=RAGGED, weights=some, D=D, refuses=""):
        given = dict(mask=mask, weights=weights)
        given = given if function == "coefficients" else dict(per_token=D) | given
        grad = "" if refuses else "weights" if function == "coefficients" else "per_token weights"
        out.append(Case(function, name, given, grad, dict(normalizer=normalizer), refuses))

    for function in ("coefficients", "weighted_mean"):
        for norm in ("batch", "sequence"):
            add(function, f"{norm}: weights of 1", norm, weights=ones)
            add(function, f"{norm}: a weight per token", norm)
            cancels = " (it cancels)" if norm == "sequence" else " (it acts)"
            add(function, f"{norm}: a weight per sequence" + cancels, norm, weights=per_row)
            add(function, f"{norm}: a sequence without tokens", norm, GAP)
            add(function, f"{norm}: a sequence whose weights sum to less than 1", norm, weights=some * 0.2)
        add(function, "every token masked is refused", "batch", RAGGED * 0, refuses="mask")
        add(function, "an unknown normalizer is refused", "token", refuses="normalizer")
    for norm in ("batch", "sequence"):
        add("weighted_mean", f"{norm}: masked tokens hold nan", norm, D=D.masked_fill(OFF, NAN))
        add("coefficients", f"{norm}: weights that all underflowed to 0: 0, not 0/0", norm, weights=some * 0)
        for place, mask in GAPS.items():
            add("coefficients", f"{norm}: a sequence without tokens, the {place}", norm, mask)
        add("coefficients", f"{norm}: masked weights hold nan", norm, weights=some.masked_fill(OFF, NAN))
    name = "batch: weights of 1e-12 have the shares of larger ones: nothing is added to their sum"
    add("coefficients", name, "batch", torch.tensor([[1, 1]]), f([1e-12, 3e-12]))
    return out


def ema() -> list[Case]:
    out, n = [], Numbers("ema")
    start, students = n.uniform(4), n.uniform(6, 4)

    def add(name, decay, shadow=start, students=students, refuses=""):
        given = dict(shadow=shadow, students=students)
        out.append(Case("ema_update", name, given, "", dict(decay=decay), refuses))

    add("decay 0.9, one update from 0 towards 1: 0.1, not 0.9", 0.9, f(0.0, 0.0), f([1.0, 1.0]))
    for decay in (0.5, 0.9, 0.98):
        add(f"decay {decay}, six updates", decay)
    add("decay 0: the student itself", 0.0)
    add("decay 1: frozen", 1.0)
    near = torch.full((8, 2), 1.0078125, dtype=torch.float64)
    add("decay 0.99, a student one bf16 step away: a bf16 shadow would never move", 0.99, f(1.0, 1.0), near)
    for decay in (1.1, -0.1):
        add(f"decay {decay} is refused", decay, refuses="decay")
    for decay, every in ((0.9, 1), (0.9, 10), (0.98, 10), (0.5, 7), (0.999, 1), (1.0, 10), (0.0, 10), (1.5, 1), (-0.5, 1)):
        end = ": never, inf" if decay >= 1 else ": at once" if decay <= 0 else ""
        name = f"decay {decay} every {every} steps{end}"
        out.append(Case("half_life", name, {}, "", dict(decay=decay, every=every)))
    return out


def reading() -> list[Case]:
    """From tokens to log-probabilities."""
    out = []

    def add(function, name, inputs, grad="", **settings):
        out.append(Case(function, name, inputs, grad, settings))

    ids = torch.tensor([[5, 6, 2, 2, 2], [7, 5, 9, 4, 8], [2, 2, 2, 2, 2], [6, 2, 5, 2, 7]])
    add("completion_mask", "pad id = end id: the first end counts, the padding does not", dict(ids=ids), eos=[2])
    add("completion_mask", "several end ids: the first of any of them", dict(ids=ids), eos=[9, 2, 4])
    add("completion_mask", "no end anywhere: all ones", dict(ids=ids), eos=[3])
    zeros = torch.tensor([[5, 2, 0, 0], [0, 5, 6, 2], [5, 0, 7, 8]])
    add("completion_mask", "0 is an ordinary id here: the mask knows no pad id", dict(ids=zeros), eos=[2])
    add("completion_mask", "text after the end does not count", dict(ids=torch.tensor([[2, 5, 6, 2]])), eos=[2])

    states, lengths = Numbers("predicting_states").uniform(3, 9, 2), torch.tensor([4, 1, 2])
    given = dict(states=states, prompt_lengths=lengths, mask=RAGGED)
    add("predicting_states", "position i predicts token i + 1: the last prompt position is the first", given, "states")
    for place, mask in GAPS.items():
        name = f"a row without tokens, the {place}: nothing of it is read"
        add("predicting_states", name, given | dict(mask=mask), "states")
    rubbish = states.clone()
    for b, end in enumerate((lengths + RAGGED.sum(1)).tolist()):
        rubbish[b, end - 1 :] = NAN
    name = "nan from each row's last token on: nothing there is read"
    add("predicting_states", name, given | dict(states=rubbish), "states")

    n, (N, H, rows) = Numbers("head_logps"), (4, 3, 7)
    given = dict(states=n.uniform(N, H), weight=n.uniform(rows, H), bias=None)
    biased, both = given | dict(bias=n.uniform(rows)), "states weight"
    usual = dict(vocab=rows, softcap=None, temperature=1.0)
    add("head_logps", "a plain head", given, both, **usual)
    add("head_logps", "padded vocabulary, rows 5 and 6: no mass, gradient 0", given, both, **usual | {"vocab": 5})
    for t in (0.7, 2.0):
        name = f"temperature {t} divides the logits, before the softmax"
        add("head_logps", name, given, both, **usual | {"vocab": 5, "temperature": t})
    add("head_logps", "bias", biased, both + " bias", **usual | {"vocab": 5})
    settings = dict(vocab=5, softcap=1.5, temperature=0.7)
    add("head_logps", "softcap 1.5, then temperature 0.7", biased, both + " bias", **settings)
    large = given | dict(states=given["states"] * 1000)
    add("head_logps", "logits in the thousands: the softmax subtracts its maximum", large, both, **usual | {"vocab": 5})
    return out


# --- the whole loss of one optimizer step -----------------------------------------------------------------------------

# Settings of the training loop, outside the objective: named in the note of a recipe that changes them.
LOOP = dict(
    sft_target="reference", teacher="frozen", ema_decay=0.9, ema_every=10, on_policy=1.0, sampler="student", temperature=1.0
)
# The settings that the vectors hold: all of the objective's but for the log's, and those that choose which answers are compared.
OBJECTIVE = [name for name in Mechanisms.__dataclass_fields__ if name != "log_entropy"] + ["agreement_budget", "uncertainty"]
V, H, ROWS, END = 6, 4, 8, 1  # vocabulary in use, hidden size, rows of the head's matrix, end-of-text id = pad id


def step(name: str, m: Config, real=False, K=3, rows=None, change=None, refuses="", note="", live=False, lengths=()) -> Case:
    """One step's recorded states, or logits where the head is the identity; null what these settings do not read. With
    `lengths`: other numbers, and as many tokens in each row.
    """
    n, (B, T), width = Numbers("step"), RAGGED.shape, H if real else V
    ids = torch.tensor([[4, 2, 5, 0, 3], [3, 1, 1, 1, 1], [2, 0, 4, 1, 1]])  # row 0 was cut, the others end
    mask = completion_mask(ids, [END])
    if lengths:
        n, (B, T) = Numbers(str(lengths)), (len(lengths), max(lengths))
        ids, mask = n.ids(B, T, high=V), (torch.arange(T) < torch.tensor(lengths).unsqueeze(1)).long()
    views, heads = n.uniform(3 + 5, B, T, width), n.uniform(2, ROWS, width)
    assert real or m.estimator != "top-k" or (views[1].sort(-1).values.diff() > 0).all(), "a tie: top-k would depend on the library"
    inputs = dict(
        student=views[0],
        teacher=views[1] if m.uses_teacher else None,
        negative=views[2] if m.w_contrast else None,
        contexts=views[3 : 3 + K] if m.uses_agreement else None,
        ids=ids,
        mask=mask,
        head=heads[0] if real else None,
        teacher_head=heads[0 if live else 1] if real and m.uses_teacher else None,
    )
    inputs |= change(inputs) if change else {}
    grad = "" if refuses or sum(lengths) > 20 else " ".join(k for k, v in inputs.items() if v is not None and v.is_floating_point())
    settings = {k: v for k, v in vars(m).items() if k in OBJECTIVE}
    return Case("objective", name, inputs, grad, dict(vocab=V, rows=rows) | settings, refuses, note)


def recipes() -> list[Case]:
    """Every recipe of unisd.RECIPES, with the settings that the tiny model's preset gives it."""
    out = []
    for recipe in RECIPES:
        for preset in ("tiny", "real") if ("real", recipe) in PRESET_RECIPES else ("tiny",):
            cfg = make(recipe, preset=preset, agreement_budget=1.0)  # the paper's form; a budget has cases of its own
            note = "; ".join(f"{k} {getattr(cfg, k)}" for k, usual in LOOP.items() if getattr(cfg, k) != usual)
            if cfg.steps == 0 and preset == "tiny":
                note = "this recipe only evaluates, it has 0 steps; with steps, this would be its objective"
            real = (False, True) if cfg.w_match or recipe in ("sft", "opsd", "agree-seq") else (False,)
            for head in real:
                name = f"recipe {recipe}, preset {preset}, {'real' if head else 'identity'} head"
                out.append(step(name, cfg, head, note=note, live=cfg.teacher == "live"))
    return out


def edges() -> list[Case]:
    out = []

    def add(name, real=False, K=3, rows=None, change=None, refuses="", lengths=(), **settings):
        out.append(step(name, Config(**settings), real, K, rows, change, refuses, lengths=lengths))

    everything = dict(divergence="jsd", alpha=0.3, agreement="token", gamma=1.0)
    everything |= dict(w_contrast=0.3, margin=0.2, w_match=0.2, w_nll=0.1)
    token, sequence = dict(agreement="token", gamma=1.0), dict(agreement="sequence", gamma=1.0)
    add("everything, real head", True, **everything)
    add("everything, micro-batch of rows 0 and 1: coefficients of the whole step", True, rows=[0, 2], **everything)
    add("everything, micro-batch of row 2: the two losses sum to the step's", True, rows=[2, 3], **everything)
    add("distill temperature 0.7: student, teacher, negative; not the contexts", distill_temperature=0.7, **everything)
    add("agreement temperature 2: the contexts only", agreement_temperature=2.0, **everything)
    add("sequence weights, normalizer batch: they act", **sequence)
    add("sequence weights, normalizer sequence: they cancel", normalizer="sequence", **sequence)
    add("no weights, normalizer sequence: equal to the case before", normalizer="sequence")
    name = "token weights and contrast, normalizer sequence: both sums use it"
    add(name, normalizer="sequence", w_contrast=0.3, **token)
    add("clip 0.8 touches some tokens: first the clip, then the weights", clip=0.8, **token)
    add("clip 0.8 of D, not of w_div D", clip=0.8, w_div=0.4, lengths=(2, 1), **token)
    add("clip at the 0.7 quantile of the step, then weights", clip_quantile=0.7, **token)
    add("clip at a quantile, micro-batch of rows 1 and 2: the whole step's quantile", clip_quantile=0.7, rows=[1, 3])
    for alpha in (0.01, 0.99):
        add(f"jsd, alpha {alpha}", divergence="jsd", alpha=alpha)
    for d in ("forward", "reverse", "jsd"):
        add(f"top-k 2 with a tail, {d}", divergence=d, estimator="top-k", top_k=2)
    add("top-k 100 is the whole vocabulary: equal to recipe sd", estimator="top-k")
    sampled = dict(divergence="reverse", estimator="sampled")
    add("the sampled estimator of the reverse KL", **sampled)
    add("the sampled estimator at distill temperature 0.7", distill_temperature=0.7, **sampled)
    add("the sampled estimator, clip 0.5: a negative value stays", clip=0.5, **sampled)
    some = dict(agreement_budget=0.5, **token)
    add("budget 0.5: contexts for the 2 rows of highest teacher's entropy, 1 elsewhere", **some)
    name = "budget 0.5, distill temperature 0.25: the entropy is taken at it, which changes the rows"
    add(name, distill_temperature=0.25, **some)
    add("budget 0.4: 1.2 of 3 rows are 2, always rounded up", **some | dict(agreement_budget=0.4))
    some = dict(agreement_budget=0.5, uncertainty="divergence", clip=0.5, **sequence)
    add("budget 0.5: contexts for the 2 rows of highest divergence, before the clip", **some)
    unsure = some | dict(clip=0.0)
    name = "budget 0.5, quantile ceiling: the divergence is taken before it; it cuts D, not w_div D"
    add(name, **unsure, K=2, clip_quantile=0.5, w_div=0.4, lengths=(2, 2))
    add("budget 0.5, top-k 2: the divergence is the estimate", **unsure, estimator="top-k", top_k=2, K=2, lengths=(4, 4))
    for place, lengths in (("first", (0, 1, 2)), ("in the middle", (2, 0, 1)), ("last", (1, 2, 0))):
        name = f"budget 0.5, a row without tokens, {place}: 1.5 of 3 rows are 2"
        add(name, K=2, lengths=lengths, w_match=0.2, **token | dict(agreement_budget=0.5))
        if "middle" not in place:
            name = f"a row without tokens, {place}, normalizer sequence: it counts in B"
            add(name, K=2, lengths=lengths, normalizer="sequence", **token)
    name = "budget 0.5, the sampled divergence below 0: the row without tokens, 0, is the one that is read; every weight is 1"
    swap = lambda inputs: {"student": inputs["student"] * 0, "teacher": torch.nn.functional.one_hot(inputs["ids"], V).double() * 3}
    add(name, K=2, change=swap, lengths=(0, 1), agreement_budget=0.5, uncertainty="divergence", **sampled, **token)
    name = "budget 0.28 of 25 rows: the float64 product is 7.000000000000001, so 8"
    add(name, K=2, lengths=(1,) * 25, agreement_budget=0.28, agreement="sequence", gamma=1.0)

    def spike(inputs: dict) -> dict:
        """Readings that nearly agree, but for one token: beyond the 0.95 quantile only where there are more than 20 tokens."""
        contexts = inputs["contexts"] * 0.1
        contexts[0, 0, 2, inputs["ids"][0, 2]] = -30.0
        return {"contexts": contexts}

    name = "one token far beyond the quantile, gamma 5: the cap is 10, and the floor below 1 / 51"
    add(name, K=2, change=spike, lengths=(21,), **token | dict(gamma=5.0))
    add("weights that all underflow to 0: a loss of 0", K=2, lengths=(2, 1), **sequence | dict(gamma=1e6))
    add("budget 0 reads no context", agreement_budget=0.0, **token)
    add("agreement with gamma 0 reads no context", agreement="token", gamma=0.0)
    add("agreement without a divergence reads no context", w_div=0.0, w_match=1.0, **token)
    for K in (2, 5):
        add(f"token agreement by range, K {K}", stat="range", K=K, **token)
    add("sequence agreement by variance, K 2", K=2, **sequence)
    add("token agreement by range, K 1: every weight is 1", stat="range", K=1, **token)
    add("agreement by variance, K 1 is refused", K=1, refuses="stat", **token)

    def garbage(inputs: dict) -> dict:
        off, kinds = inputs["mask"] == 0, dict(student=NAN, teacher=1e30, negative=INF, contexts=-INF)
        bad = {k: inputs[k].masked_fill(off.unsqueeze(-1), x) for k, x in kinds.items()}
        return bad | {"ids": inputs["ids"].masked_fill(off, -100)}

    add("everything, identity head", **everything)
    add("the same with nan, inf, 1e30 and ids of -100 where masked: the same loss", change=garbage, **everything)
    short = lambda _: {"mask": torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]])}
    add("rows of one, no and two tokens", change=short, w_nll=0.5, **token)
    add("teacher = student: loss 0 and gradient 0", change=lambda inputs: {"teacher": inputs["student"]})
    none = lambda inputs: {"mask": inputs["mask"] * 0}
    add("every token masked is refused", change=none, refuses="mask", w_div=0.0, w_nll=1.0)
    add("two ceilings are refused", refuses="clip", lengths=(1,), clip=0.5, clip_quantile=0.7)
    for d in ("forward", "jsd"):
        name = f"the sampled estimator of {d} is refused"
        add(name, refuses="sampled", lengths=(1,), divergence=d, estimator="sampled")
    add("jsd with alpha 1 is refused", refuses="alpha", divergence="jsd", alpha=1.0)
    return out


def small() -> list[Case]:
    """One or two tokens over two words: what larger cases forgive."""
    out = []

    def add(name, student, teacher=None, negative=None, contexts=None, mask=((1,),), ids=None, heads=False, rows=None, **settings):
        """Logits as a list of all tokens' pairs; `heads`: both are the identity, as matrices."""
        mask, (B, T) = torch.tensor(mask), (len(mask), len(mask[0]))
        views = dict(student=student, teacher=teacher, negative=negative, contexts=contexts)
        inputs = {k: None if x is None else f(*x).reshape(*[2] * (k == "contexts"), B, T, 2) for k, x in views.items()}
        inputs |= dict(ids=mask * 0 if ids is None else torch.tensor(ids), mask=mask)
        inputs |= {k: f([1.0, 0.0], [0.0, 1.0]) if heads else None for k in ("head", "teacher_head")}
        grad = " ".join(k for k, v in inputs.items() if v is not None and v.is_floating_point())
        used = {k: v for k, v in vars(Config(**settings)).items() if k in OBJECTIVE}
        out.append(Case("objective", name, inputs, grad, dict(vocab=2, rows=rows) | used))

    one, other, even = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]
    tokens, rows = ((1, 1),), ((1,), (1,))
    nll, sequence = dict(w_div=0.0, w_nll=1.0), dict(agreement="sequence", gamma=1.0)
    add("distill temperature 0.5 through real heads", [one], [other], heads=True, distill_temperature=0.5)
    name, some = "agreement temperature 0.5 through real heads", dict(heads=True, agreement_temperature=0.5)
    add(name, [one], [other], contexts=[one, even], normalizer="sequence", **some, **sequence)
    name = "micro-batch of row 0, normalizer sequence: B is the step's"
    add(name, [one, even], mask=rows, rows=[0, 1], normalizer="sequence", **nll)
    name = "budget 0.5, micro-batch of row 0: the step's one row that is read is the other"
    two = dict(student=[one, even], teacher=[[3.0, 0.0], [0.5, 0.0]], contexts=[one, [2.0, 0.0], even, even], mask=rows)
    add(name, **two, rows=[0, 1], agreement_budget=0.5, **sequence)
    add("sequence agreement by range", **two, stat="range", **sequence)
    add("micro-batch without tokens: a loss of 0, not refused", [one, even], mask=((1,), (0,)), rows=[1, 2], **nll)
    ragged = dict(mask=((1, 1), (1, 0)), normalizer="sequence")
    add("cross-entropy alone, normalizer sequence", [one, even, even, even], ids=[[0, 0], [1, 0]], **ragged, **nll)
    far = [[3.0, 0.0], even, even, even]
    add("feature matching alone, normalizer sequence", [even] * 4, far, w_div=0.0, w_match=1.0, **ragged)
    add("contrast without a divergence: the teacher is read", [one], [other], [[1.0, 1.0]], w_div=0.0, w_contrast=1.0)
    name, contexts = "token weights, gamma 1000: the floor is 0.01", [even, even, even, [3.0, 0.0]]
    add(name, [even, even], [one, [3.0, 0.0]], contexts=contexts, mask=tokens, agreement="token", gamma=1000.0)
    add("logits of 1000: the objective's log-softmax subtracts its maximum", [[1000.0, 996.0]], [[996.0, 1000.0]])
    add("jsd, alpha 0.3, top-k 1", [one], [other], divergence="jsd", alpha=0.3, estimator="top-k", top_k=1)
    sampled = dict(mask=tokens, divergence="reverse", estimator="sampled")
    name = "the sampled estimator below 0 throughout: its quantile ceiling is 1e-6"
    add(name, [[0.0, 3.0], other], [[3.0, 0.0], one], clip_quantile=0.5, **sampled)
    name = "the sampled estimator, -1 and 1: the ceiling at quantile 0.75 is 0.5"
    add(name, [other, one], [one, other], clip_quantile=0.75, **sampled)
    return out


FILES = {
    "losses.json": lambda: divergences() + other_losses(),
    "agreement.json": lambda: disagreement() + weights() + means(),
    "ema.json": ema,
    "reading.json": reading,
    "objective.json": lambda: recipes() + edges() + small(),
}
