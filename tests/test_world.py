"""The embedded world: its answers are right, its wrong references wrong, its split disjoint, its scorer fair."""

import random
import re
from dataclasses import replace

import pytest

from engine.config import Config
from engine.metrics import measure
from tasks import world
from tasks.data import Example
from tasks.world import FAMILIES, blotted, distinct, draw, score


def items(family, n=150, **how):
    r = random.Random(7)
    return [draw(r, family, test=False, **how) for _ in range(n)]


@pytest.mark.parametrize("family", FAMILIES)
def test_worked_and_terse_answers_are_right_and_the_negative_is_wrong(family):
    for scramble in (False, True):
        some = [world.to_example(i, random.Random(0)) for i in items(family, 20, scramble=scramble)]
        for text, right in ((lambda e: e.demo, True), (lambda e: e.target, True)):
            assert all(r["correct"] is right for r in score(some, [text(e) for e in some]))
        wrong = [world.to_example(i, random.Random(0), wrong=True) for i in items(family, 20, scramble=scramble)]
        assert not any(r["correct"] for r in score(wrong, [e.target for e in wrong]))


def test_a_sum_by_hand():
    item = next(i for i in items("sum", 500) if "+1=" in i.worked)
    a, b = map(int, item.question.split("+"))
    steps = re.fullmatch(r"(\d)\+(\d)=(\d+) (\d)\+(\d)\+1=(\d+) so (\d+)", item.worked)
    ones, tens = int(steps[3]), int(steps[6])
    assert (int(steps[1]), int(steps[2])) == (a % 10, b % 10) and ones >= 10
    assert tens * 10 + ones % 10 == a + b == int(steps[7])
    assert not item.known  # a carry is what the base has not met alone


def test_right_and_wrong_reference_differ_in_content_not_in_form():
    for e in world.load(300, 1, seed=3).train:
        blots = lambda text: [m.start() for m in re.finditer("_", text)]
        assert e.reference != e.negative or "_" in e.reference
        if e.task != "tool" and len(e.reference) == len(e.negative):
            assert blots(e.reference) == blots(e.negative)


def test_kinds_of_references():
    """They differ in nothing but the references: whoever compares two kinds compares the same questions in the same order."""
    tasks = {
        kind: world.load(1000, 20, 0.2, references=kind) for kind in Config.__dataclass_fields__["references"].metadata["choices"]
    }
    plain = tasks["blotted"]
    assert plain.fingerprint() == world.load(1000, 20, 0.2).fingerprint()
    strip = lambda task: [replace(e, reference="x", negative="") for e in task.train + task.test + task.ood]
    assert all(strip(task) == strip(plain) for task in tasks.values())
    unreadable = lambda task: sum(e.reference.count("_") for e in task.train)
    assert unreadable(tasks["faint"]) > 2 * unreadable(plain)
    hidden = {kind: sum(e.reference == e.negative for e in task.train) for kind, task in tasks.items()}
    assert hidden["blotted"] > 100 and hidden["distinct"] == 0
    odd = [(e, e0) for e, e0 in zip(tasks["odd"].train, plain.train, strict=True) if e != e0]
    assert 60 < len(odd) < 140 and all(e.reference == world.ODD.format(e0.reference) for e, e0 in odd)
    assert all(e.negative == world.ODD.format(e0.negative) and e.target == e0.target for e, e0 in odd)


def test_blots():
    assert blotted("(x+3)*2 rome", [0.9] * 20, 0.5) == "(x+3)*2 rome"
    assert blotted("(x+3)*2 rome", [0.0] * 20, 0.5) == "_______ _"
    assert blotted("ab 12", [0.0, 0.9, 0.0], 0.5) == "_ 1_"


def test_train_and_test_are_disjoint_and_the_same_for_a_seed():
    a, b = world.load(1000, 50, seed=0), world.load(1000, 50, seed=1)
    assert not {e.question for e in a.train} & {e.question for e in a.test + a.ood + b.test}
    assert len({e.question for e in a.train}) == 1000 and len(a.test) == 250 and len(a.ood) == 150
    assert a.test == b.test and a.train != b.train
    assert a.fingerprint() == world.load(1000, 50, seed=0).fingerprint() != b.fingerprint()


def test_out_of_distribution_is_harder_by_construction():
    task = world.load(100, 30)
    asks = {word for words, _ in world.TOOLS.values() for word in words}
    for e in task.ood:
        if e.task == "choice":
            assert len({n[0] for n in re.findall(r"\d\d", e.question)}) == 1
        elif e.task == "fact":
            assert e.question.count(", ") == 5 and e.answer in e.question
        else:
            assert len([word for word in e.question.split() if word in asks]) == 2
    assert {e.task for e in task.ood} == set(world.OOD_FAMILIES) == {"choice", "fact", "tool"}


def test_out_of_distribution_there_is_something_to_learn(tiny):
    task = world.load(len(world.FAMILIES), 40)
    alone, shown = (measure(tiny, task, task.ood, with_reference, 40)["by_task"] for with_reference in (False, True))
    assert all(10 <= alone[family] <= 50 and 60 <= shown[family] <= 95 for family in alone), (alone, shown)


def test_wrong_references_on_demand():
    noisy = [e for e in world.load(2000, 5, wrong_references=0.35).train if e.task != "code"]  # programs take long to judge
    right = [r["correct"] for r in score(noisy, [e.target for e in noisy])]
    assert 0.6 < sum(right) / len(right) < 0.7


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_reference_is_wrong_the_negative_is_wrong_too(family):
    some = items(family, 60)
    others = [world.other_slip(item) for item in some]
    assert all(other not in (item.terse, item.wrong) for item, other in zip(some, others, strict=True))
    examples = [world.to_example(item, random.Random(0)) for item in some]
    assert not any(r["correct"] for r in score(examples, others))


@pytest.mark.slow
def test_the_world_is_finite_and_says_so():
    with pytest.raises(ValueError, match="--eval-size"):
        list(distinct(("choice",), 3000, -1, test=True, ood=True))
    with pytest.raises(ValueError, match="--train-size 4"):
        world.load(train_size=4)


@pytest.mark.parametrize(
    ("family", "answer", "text", "correct"),
    [
        ("sum", "85", "7+8=15 4+3+1=8 so 85", True),
        ("sum", "85", "85", True),
        ("sum", "85", "85 no, so 95", False),
        ("sum", "85", "", False),
        ("choice", "B", "A 4, B 9 so B", True),
        ("choice", "B", "B no A", False),
        ("fact", "cave", "the lamp is in the cave", True),
        ("fact", "cave", "not the cave, the mill", False),
        ("tool", ("hotel", {"city": "rome", "nights": "2"}), 'Action: hotel Input: {"city": "rome", "nights": "2"}', True),
        ("tool", ("hotel", {"city": "rome", "nights": "2"}), 'Action: hotel Input: {"nights": "2", "city": "rome"}', True),
        ("tool", ("hotel", {"city": "rome", "nights": "2"}), "hotel rome 2", True),
        (
            "tool",
            ("hotel", {"city": "rome", "nights": "2"}),
            'Action: hotel Input: {"city": "rome", "nights": "2", "x": "1"}',
            False,
        ),
        ("tool", ("hotel", {"city": "rome", "nights": "2"}), 'Action: hotel Input: {"city": ', False),
        ("code", ("assert f(1) == 8",), "def f(x): return (x+3)*2", True),
        ("code", ("assert f(1) == 8",), "(x+3)*2", True),
        ("code", ("assert f(1) == 8",), "def f(x): return x", False),
        ("code", ("assert f(1) == 8",), "def f(x): return (", False),
        ("code", ("assert f(1) == 8",), "__import__('os')._exit(0)", False),
    ],
)
def test_scoring(family, answer, text, correct):
    example = Example(family, "q", "r", answer=answer)
    assert score([example], [text])[0]["correct"] is correct


def test_abstaining():
    example = Example("choice", "q", "r", answer="B")
    assert score([example], ["no idea"])[0] == {"correct": False, "abstained": True}
