"""The embedded world: its answers are right, its wrong references wrong, its split disjoint, its model half knows it, and it can be rebuilt."""

import random
import re

import pytest
import torch

import tiny
from eval import measure
from rollout import load
from tiny import FAMILIES, blotted, distinct, draw, score


@pytest.fixture(scope="module")
def lm():
    return load("tiny", torch.device("cpu"))


def items(family, n=150, **how):
    r = random.Random(7)
    return [draw(r, family, test=False, **how) for _ in range(n)]


@pytest.mark.parametrize("family", FAMILIES)
def test_worked_and_terse_answers_are_right_and_the_negative_is_wrong(family):
    for scramble in (False, True):
        some = [tiny.to_example(i, random.Random(0)) for i in items(family, 40, scramble=scramble)]
        for text, right in ((lambda e: e.demo, True), (lambda e: e.target, True)):
            assert all(r["correct"] is right for r in score(some, [text(e) for e in some]))
        wrong = [tiny.to_example(i, random.Random(0), wrong=True) for i in items(family, 40, scramble=scramble)]
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
    for e in distinct(FAMILIES, 60, seed=3, test=False):
        blots = lambda text: [m.start() for m in re.finditer("_", text)]  # noqa: E731
        assert e.reference != e.negative or "_" in e.reference
        if e.task != "tool" and len(e.reference) == len(e.negative):
            assert blots(e.reference) == blots(e.negative)


def test_blots():
    assert blotted("(x+3)*2 rome", [0.9] * 20, 0.5) == "(x+3)*2 rome"
    assert blotted("(x+3)*2 rome", [0.0] * 20, 0.5) == "_______ _"
    assert blotted("ab 12", [0.0, 0.9, 0.0], 0.5) == "_ 1_"


def test_train_and_test_are_disjoint_and_the_same_for_a_seed():
    a, b = tiny.load(1000, 50, seed=0), tiny.load(1000, 50, seed=1)
    assert not {e.question for e in a.train} & {e.question for e in a.test + a.ood + b.test}
    assert len({e.question for e in a.train}) == 1000 and len(a.test) == 250 and len(a.ood) == 100
    assert a.test == b.test and a.train != b.train
    assert a.fingerprint() == tiny.load(1000, 50, seed=0).fingerprint() != b.fingerprint()


def test_out_of_distribution_is_harder_by_construction():
    task = tiny.load(100, 30)
    for e in task.ood:
        if e.task == "choice":
            assert len({n[0] for n in re.findall(r"\d\d", e.question)}) == 1
        else:
            assert e.question.count("then") == 2


def test_wrong_references_on_demand():
    noisy = tiny.load(2000, 5, wrong_references=0.35).train
    right = [r["correct"] for r in score(noisy, [e.target for e in noisy])]
    assert 0.6 < sum(right) / len(right) < 0.7


@pytest.mark.parametrize(
    ("family", "answer", "text", "correct"),
    [
        ("sum", "85", "7+8=15 4+3+1=8 so 85", True),
        ("sum", "85", "85", True),
        ("sum", "85", "85 no, so 95", False),
        ("sum", "85", "", False),
        ("choice", "B", "A 4, B 9 so B", True),
        ("choice", "B", "B no A", False),
        ("fact", "B", "lamp in cave B", True),
        ("fact", "B", "lamp in cave", False),
        ("tool", ("hotel", {"city": "rome", "nights": "2"}), 'Action: hotel Input: {"city": "rome", "nights": "2"}', True),
        ("tool", ("hotel", {"city": "rome", "nights": "2"}), 'Action: hotel Input: {"nights": "2", "city": "rome"}', True),
        ("tool", ("hotel", {"city": "rome", "nights": "2"}), "hotel rome 2", True),
        ("tool", ("hotel", {"city": "rome", "nights": "2"}), 'Action: hotel Input: {"city": "rome", "nights": "2", "x": "1"}', False),
        ("tool", ("hotel", {"city": "rome", "nights": "2"}), 'Action: hotel Input: {"city": ', False),
        ("code", ("assert f(1) == 8",), "def f(x): return (x+3)*2", True),
        ("code", ("assert f(1) == 8",), "(x+3)*2", True),
        ("code", ("assert f(1) == 8",), "def f(x): return x", False),
        ("code", ("assert f(1) == 8",), "def f(x): return (", False),
        ("code", ("assert f(1) == 8",), "__import__('os')._exit(0)", False),
    ],
)
def test_scoring(family, answer, text, correct):
    example = tiny.Example(family, "q", "r", answer=answer)
    assert score([example], [text])[0]["correct"] is correct


def test_abstaining():
    example = tiny.Example("choice", "q", "r", answer="B")
    assert score([example], ["no idea"])[0] == {"correct": False, "abstained": True}


def test_the_base_half_knows_the_world_and_can_use_a_reference(lm):
    task = tiny.load(100, 60)
    alone, helped = measure(lm, task, task.test), measure(lm, task, task.test, with_reference=True)
    assert 30 <= alone["accuracy"] <= 50 and max(alone["by_task"].values()) <= 75
    assert 78 <= helped["accuracy"] <= 97
    misled = [tiny.Example(e.task, e.question, e.negative, answer=e.answer) for e in task.test]
    assert measure(lm, task, misled, with_reference=True)["accuracy"] < alone["accuracy"]


def test_it_is_an_ordinary_small_checkpoint(lm):
    files = {p.name: p.stat().st_size for p in tiny.ASSET.iterdir()}
    assert sum(files.values()) < 4_000_000 and "model.safetensors" in files
    assert type(lm.model).__name__ == "Qwen2ForCausalLM" and lm.vocab <= lm.model.config.vocab_size
    tok = lm.tokenizer
    ids = tok.apply_chat_template([{"role": "user", "content": "47+38"}], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert tok.decode(ids["input_ids"]) == "<|im_start|>user\n47+38<|im_end|>\n<|im_start|>assistant\n"
    strange = "Grüße 漢字 \t x = 3.5\n\nok"
    assert tok.decode(tok(strange)["input_ids"]) == strange  # any text can be encoded


def test_the_script_still_works(tmp_path, capsys):
    tiny.main(["--out", str(tmp_path / "m"), "--steps", "12", "--hidden", "64", "--layers", "1"])
    small = load(str(tmp_path / "m"), torch.device("cpu"))
    assert small.vocab == len(tiny.make_tokenizer()) and "parameters" in capsys.readouterr().out
    losses = tiny.pretrain(small.model, small.tokenizer, steps=15, batch=32)
    assert sum(losses[-3:]) < sum(losses[:3])
