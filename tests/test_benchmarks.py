"""The paper's data sets: every record is converted right, every scorer reads fairly, every negative is wrong."""

import json
import random
import re
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tasks import benchmarks, records, scoring
from tasks.benchmarks import BENCHMARKS, load_task
from tasks.data import Example
from tasks.negatives import add_negatives, mutants, swapped
from tasks.records import Skip
from tasks.scoring import as_number, same, score_all


def score(example, completion):
    """Of one completion."""
    return score_all([example], [completion])[0]


FIXTURES = Path(__file__).parent / "fixtures"  # invented records, in the columns of the data sets


def rows_of(name):
    name = "gpqa" if name.startswith("gpqa") else name
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text().splitlines()]


def convert(name, index, seed=0):
    return BENCHMARKS[name].to_example(rows_of(name)[index], index, seed)


@pytest.fixture
def offline_rows(monkeypatch):
    """The fixtures instead of the hub."""
    monkeypatch.setattr(benchmarks, "_rows", lambda benchmark, side: rows_of(benchmark.name))


# --- records ---------------------------------------------------------------------------------------------------------


def test_scienceqa_shows_lecture_and_hint_and_moves_the_letter_with_its_option():
    letters = set()
    for seed in range(8):
        e = convert("scienceqa", 0, seed)
        options = re.findall(r"^([A-D])\. (.+)$", e.question, re.MULTILINE)
        assert dict(options)[e.answer["letter"]] == "copper wire"
        assert [text for _, text in options] == e.answer["options"]
        assert sorted(e.answer["options"]) == ["copper wire", "glass rod", "rubber band", "wooden spoon"]
        letters.add(e.answer["letter"])
    assert len(letters) > 1
    assert e.question.startswith(
        "Lecture: Metals are good conductors.\n\n"
        "Context: Ana touches each thing to the two ends of a broken circuit.\n\nQuestion: Which of these"
    )
    assert "(A, B, C or D)" in e.question and e.question.endswith("\nAnswer: ...") and e.task == "scienceqa"
    assert e.reference.startswith("Copper wire is a metal") and e.reference.endswith(f"\n\nAnswer: {e.answer['letter']}")
    assert e.reference == convert("scienceqa", 0, seed).reference


def test_without_an_explanation_the_reference_is_the_answer_line():
    e = convert("scienceqa", 1)
    assert e.reference == f"Answer: {e.answer['letter']}"
    assert e.question.startswith("Question: What is the plural") and "Context" not in e.question


def test_gpqa_cos_e_and_medmcqa():
    e = convert("gpqa", 0)
    assert e.answer["options"]["ABCD".index(e.answer["letter"])] == "2T"  # stripped, and found again after the shuffle
    assert e.reference == f"The period grows with the root of the mass, so it is 2T.\n\nAnswer: {e.answer['letter']}"
    assert convert("gpqa-diamond", 0).task == "gpqa-diamond"

    e = convert("cos_e", 0)
    assert e.answer == {"kind": "choice", "letter": "B", "options": ["cupboard", "fridge", "oven", "garden", "car"]}
    assert e.reference == "a fridge keeps food cold\n\nAnswer: B" and "A. cupboard\nB. fridge" in e.question

    e = convert("medmcqa", 1)
    assert e.answer == {"kind": "choice", "letter": "C", "options": ["Two", "Three", "Four", "Five"]}
    assert e.reference == "Answer: C"
    assert convert("medmcqa", 0).reference.startswith("Ans. is 'c' i.e., Vitamin D.")


def test_gsm8k_without_its_calculator_notes():
    e = convert("gsm8k", 0)
    assert e.reference == "She bakes 12*4=48 rolls.\nThey bring 48*3=$144.\n#### 144"
    assert e.answer == {"kind": "number", "value": "144", "mark": "####"} and e.question.endswith("\n#### ...")
    assert convert("gsm8k", 1).answer["value"] == "1200"


def test_mbpp_demands_what_the_tests_use_and_holds_an_assert_back():
    e = convert("mbpp", 0)  # a helper stands first in the gold code
    assert e.answer["entry"] == "square_digits" and "def square_digits(values, base=10):" in e.question
    assert "digits(n)" not in e.question and "\r" not in e.reference
    assert "== [1]" in e.question and "assert square_digits([]) == []" not in e.question
    assert e.answer["tests"] == rows_of("mbpp")[0]["test_list"] and e.answer["prelude"] == ""

    e = convert("mbpp", 1)  # a class, which only the setup uses
    assert e.answer["entry"] == "is_flat" and "class Node:\n    def __init__(self, value):" in e.question
    assert "top.left = Node(2)" in e.question and e.answer["tests"][0].startswith("top = Node(1)\n")

    e = convert("mbpp-sanitized", 0)
    assert e.question.startswith("Write Python code for this task.\n\nWrite a function to compute the length")
    assert e.answer["tests"][0] == e.answer["prelude"] == "import math" and e.answer["entry"] == "arc"
    assert BENCHMARKS["mbpp"].config == "full" and BENCHMARKS["mbpp"].test_config == "sanitized"


def test_humaneval_gives_the_helpers_of_its_prompt_to_answers_and_tests():
    e = convert("humaneval", 0)
    assert e.answer["entry"] == "total" and e.answer["tests"][-1] == "check(total)"
    assert e.answer["prelude"].startswith("from typing import List") and "def clip(x: int)" in e.answer["prelude"]
    alone = "```python\ndef total(values: List[int]) -> int:\n    return sum(clip(v) for v in values)\n```"
    assert score(e, alone)["correct"] and score(e, e.reference)["correct"]
    assert "negative ones counted as 0.\n    >>> total([1, -2, 3])" in e.question


def test_toolalpaca_keeps_every_call():
    e = convert("toolalpaca", 0)
    call = {"action": "sendParcel", "arguments": {"city": "Oslo", "size": "small", "count": 2}}
    assert e.answer == {"kind": "tools", "calls": [call], "actions": ["findParcel"]}
    assert e.reference.startswith("Thought: They go to Oslo.\nAction: sendParcel\nAction Input: {")
    assert e.question.count("Send two small parcels") == 1 and "Action Input" in e.question

    e = convert("toolalpaca", 1)  # golden_answer as a record of lists, no golden_response
    assert [c["action"] for c in e.answer["calls"]] == ["sendParcel", "findParcel"] and e.reference.count("Action:") == 2
    assert convert("toolalpaca", 2).reference == 'Action: findParcel\nAction Input: {"id": "p9"}'  # not the contradicting response
    assert convert("toolalpaca", 5).answer["calls"] == [{"action": "findParcel", "arguments": {}}]
    row = dict(rows_of("toolalpaca")[0], prompt="You have tools.")
    question = BENCHMARKS["toolalpaca"].to_example(row, 0, 0).question
    assert "Question: Send two" in question and records.REACT in question


@pytest.mark.parametrize(
    ("name", "index", "reason"),
    [
        ("scienceqa", 2, "has an image"),
        ("scienceqa", 4, "no answer"),
        ("gpqa", 2, "no Correct Answer"),
        ("cos_e", 2, "not among the choices"),
        ("medmcqa", 2, "no answer"),
        ("medmcqa", 3, "no opb"),
        ("gsm8k", 2, "no number"),
        ("mbpp", 2, "tests use nothing"),
        ("mbpp", 3, "not Python"),
        ("mbpp-sanitized", 2, "no text"),
        ("humaneval", 2, "no entry point"),
        ("toolalpaca", 3, "not a JSON object"),
        ("toolalpaca", 4, "no gold call"),
    ],
)
def test_what_cannot_be_used_says_why(name, index, reason):
    with pytest.raises(Skip, match=reason):
        convert(name, index)


def converted(name, row):
    return BENCHMARKS[name].to_example(row, 0, 0)


def test_a_right_option_that_stands_there_twice_is_left_out():
    """Whichever of the two letters were right, the other would be called wrong."""
    gpqa = {"Question": "q", "Correct Answer": "2T", "Incorrect Answer 1": " 2T\r\n"} | {
        f"Incorrect Answer {i}": str(i) for i in (2, 3)
    }
    medmcqa = {"question": "q", "opa": "x", "opb": "x", "opc": "y", "opd": "z"}
    twice = [("scienceqa", {"question": "q", "choices": ["a  b", "c", "a b"], "answer": 0}), ("gpqa", gpqa)]
    for name, row in [
        *twice,
        ("medmcqa", medmcqa | {"cop": 1}),
        ("cos_e", {"question": "q", "choices": ["a", "a"], "answer": "a"}),
    ]:
        with pytest.raises(Skip, match="the right option stands there twice"):
            converted(name, row)
    assert converted("medmcqa", medmcqa | {"cop": 2}).answer["letter"] == "C"  # two wrong ones may be the same
    genes = converted("scienceqa", {"question": "q", "choices": ["FF", "ff", "Ff"], "answer": 0}).answer
    assert genes["options"]["ABC".index(genes["letter"])] == "FF"


def test_no_carriage_return_comes_through():
    choices = {"question": "q\r\nr", "choices": ["a\r\nb", "c\rd"]}
    mbpp = {
        "text": "t",
        "code": "def f(x):\r\n    return x",
        "test_list": ["assert f(1) == 1\r\nassert f(2) == 2"],
        "test_imports": ["import re\r\n"],
    }
    humaneval = {
        "prompt": "def f(x):\r\n",
        "canonical_solution": "    return x\r\n",
        "entry_point": "f",
        "test": "def check(f):\r\n    assert f(1)",
    }
    rows = [
        ("scienceqa", choices | {"answer": 0}),
        ("cos_e", choices | {"answer": "a\r\nb"}),
        ("mbpp", mbpp),
        ("humaneval", humaneval),
    ]
    for name, row in rows:
        assert "\r" not in str(vars(converted(name, row))).replace("\\r", "\r"), name


SENT = {"city": "Oslo", "note": "Action: find\nAction Input: {}"}  # reads like a call, and is an argument


@pytest.mark.parametrize(
    "golden",
    [
        [{"Action": "send", "Action_Input": json.dumps(SENT)}],
        [{"Action": "send", "Action_Input": SENT}],
        {"Action": "send", "Action_Input": json.dumps(SENT)},
        json.dumps([{"Action": "send", "Action_Input": json.dumps(SENT)}]),
        json.dumps({"Action": ["send"], "Action_Input": [json.dumps(SENT)]}),
    ],
)
def test_a_golden_answer_in_every_form(golden):
    row = dict(rows_of("toolalpaca")[0], golden_answer=golden)
    e = converted("toolalpaca", row)
    assert e.answer["calls"] == [{"action": "send", "arguments": SENT}] and score(e, e.reference)["correct"]


@pytest.mark.parametrize(
    "golden", ["no JSON", "3", [3], [None], {"Action": ["a"], "Action_Input": []}, [{"Action_Input": "{}"}], "[" * 9999]
)
def test_a_golden_answer_that_is_none_is_counted(golden):
    with pytest.raises(Skip, match="no gold call"):
        converted("toolalpaca", dict(rows_of("toolalpaca")[0], golden_answer=golden))


def test_answers_are_plain_data(offline_rows):
    for name, b in BENCHMARKS.items():
        for e in benchmarks.draw(b, "test", 0, 0)[0]:
            assert json.loads(json.dumps(e.answer)) == e.answer and e.task == name and e.negative == ""


# --- negatives -------------------------------------------------------------------------------------------------------


def test_every_reference_is_right_and_every_negative_wrong(offline_rows):
    everything = [e for b in BENCHMARKS.values() for e in benchmarks.draw(b, "train", 0, 0)[0]]
    proven, counts = add_negatives(everything, 3)
    assert counts == {"found": len(everything), "missing": 0, "reference_fails": 0}
    right = score_all(proven, [e.reference for e in proven])
    wrong = score_all(proven, [e.negative for e in proven])
    assert all(r["correct"] and r["strict"] and not r["abstained"] for r in right)
    assert not any(r["correct"] or r["abstained"] for r in wrong)
    for e in proven:  # the same template: only content differs
        shape = lambda text: [text.count(x) for x in ("\n", "```", "Answer:", "Action", "####")]
        assert shape(e.reference) == shape(e.negative), e.negative
    assert add_negatives(everything, 3)[0] == proven


def test_a_wrong_explanation_argues_for_the_wrong_option():
    e = convert("medmcqa", 0)
    (e,), _ = add_negatives([e], 0)
    letter = score(e, e.negative)["said"]
    wrong = e.answer["options"]["ABCD".index(letter)]
    assert e.negative.startswith(f"Ans. is '{letter.lower()}' i.e., {wrong}. Sunlight turns") and e.negative.endswith(letter)
    assert swapped("Oxygen, not iron. Iron-free oxygen.", "oxygen", "iron") == "Iron, not oxygen. Oxygen-free iron."


def test_a_wrong_number_is_wrong_everywhere():
    (e,), _ = add_negatives([convert("gsm8k", 1)], 0)
    said = str(scoring.said_number(e.negative))
    assert said != "1200" and e.negative == f"There are 30*40={int(said):,} seats.\n#### {said}"


def test_a_wrong_call_changes_one_thing():
    for seed in range(6):
        (e,), _ = add_negatives([convert("toolalpaca", 0)], seed)
        r = score(e, e.negative)
        assert (r["action"] == 0.0) != (r["arguments"] == pytest.approx(2 / 3))


def test_mutants_are_python_and_keep_the_layout():
    code = 'def f(a, b):  # ünï\n    """Doc 1."""\n    a.sort()\n    if a[0] < 3 and b != "x":\n        return "y"\n    return a'
    every = list(mutants(code, random.Random(0)))
    assert len(every) == len(set(every)) > 8 and all(scoring.parse_python(m) for m in every)
    assert all(m.count("\n") == code.count("\n") and "# ünï" in m and "Doc 1." in m for m in every)
    assert any("    pass\n" in m for m in every) and any("<= 3" in m for m in every)


def test_what_has_no_negative_is_counted():
    example = lambda code: Example(
        "t", "q", f"```python\n{code}\n```", {"kind": "code", "entry": "f", "tests": ["assert f(1) == 1"], "prelude": ""}
    )
    got, counts = add_negatives([example("def f(x): return x"), example("def f(x): return 2"), example("def f(x): pass")], 0)
    assert counts == {"found": 1, "missing": 0, "reference_fails": 2} and [bool(e.negative) for e in got] == [True, False, False]
    text = Example("t", "q", "Answer: Paris", {"kind": "text", "value": "Paris", "mark": "Answer:"})
    assert add_negatives([text], 0)[1] == {"found": 0, "missing": 1, "reference_fails": 0}


# --- loading a task --------------------------------------------------------------------------------------------------


def test_a_task_and_its_manifest(offline_rows):
    task, manifest = load_task("scienceqa", train_size=2, test_size=2, seed=5)
    assert (len(task.train), len(task.test), len(task.ood)) == (2, 2, 2) and {e.task for e in task.ood} == {"gpqa"}
    read = manifest["train"]
    assert read["rows"] == 5 and read["kept"] == 2 and read["read"] == 2 + sum(read["dropped"].values()) <= 5
    assert manifest["negatives"] == {"found": 2, "missing": 0, "reference_fails": 0}
    assert manifest["fingerprint"] == task.fingerprint() and task.score is score_all
    _, manifest = load_task("scienceqa")
    assert manifest["test"] == {"data": "scienceqa", "rows": 5, "read": 5, "kept": 3, "dropped": manifest["test"]["dropped"]}
    assert manifest["test"]["dropped"] == {"has an image": 1, "no answer": 1}
    json.dumps(manifest)


def test_same_seed_same_examples_and_the_test_side_is_the_same_for_every_seed(offline_rows):
    a, b, c = (load_task("scienceqa", seed=seed)[0] for seed in (1, 1, 2))
    assert a.train == b.train and a.fingerprint() == b.fingerprint() != c.fingerprint()
    assert a.test == c.test and a.ood == c.ood
    bare = load_task("scienceqa", seed=1, negatives=False)[0]
    assert [e.question for e in bare.train] == [e.question for e in a.train] and not any(e.negative for e in bare.train)
    assert len({tuple(e.answer["letter"] for e in load_task("scienceqa", seed=s)[0].train) for s in range(9)}) > 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpqa", "train on scienceqa"), ("humaneval", "train on mbpp, mbpp-sanitized"), ("gpqa-diamond", "evaluation only")],
)
def test_what_is_for_evaluation_only_is_not_trained_on(offline_rows, name, message):
    with pytest.raises(ValueError, match=f"--data {name} is for evaluation only.*") as error:
        load_task(name)
    assert message in str(error.value) and "\n" not in str(error.value)
    task, _ = load_task(name, train_size=None)
    assert task.train == [] and len(task.test) == 2


def test_unknown_names_and_unusable_data_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match=r"--data mmlu: no such data set; there are scienceqa, .*\.jsonl"):
        load_task("mmlu")
    monkeypatch.setattr(benchmarks, "_rows", lambda benchmark, side: [{"other": 1}, {"other": 2}])
    with pytest.raises(ValueError, match=r"--data medmcqa: no record of its train side can be used: {'no answer': 2}"):
        load_task("medmcqa", negatives=False)
    with pytest.raises(ValueError, match="a size of -1 is negative"):
        load_task("gsm8k", test_size=-1)


def test_offline_is_one_line():
    with pytest.raises(ValueError, match=r"^--data gsm8k: openai/gsm8k is not cached here .*\.jsonl file$"):
        load_task("gsm8k")
    assert "hf auth login" in benchmarks._explain(BENCHMARKS["gpqa"], "Dataset 'x' is a gated dataset on the Hub")


def test_without_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load_task("gsm8k")


def test_images_are_not_decoded(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list(
        [dict(r, image={"bytes": b"no image", "path": None} if r["image"] else None) for r in rows_of("scienceqa")]
    )
    rows = rows.cast_column("image", datasets.Image())
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    kept, count = benchmarks.draw(BENCHMARKS["scienceqa"], "test", 0, 0)
    assert len(kept) == 3 and count["dropped"] == {"has an image": 1, "no answer": 1}
    assert asked == [(("derek-thomas/ScienceQA", None), {"split": "test"})]
    benchmarks._rows(BENCHMARKS["mbpp"], "test"), benchmarks._rows(BENCHMARKS["cos_e"], "test")
    assert asked[1:] == [
        (("google-research-datasets/mbpp", "sanitized"), {"split": "test"}),
        (("Salesforce/cos_e", "v1.11"), {"split": "validation"}),
    ]


def test_a_missing_ood_set_is_a_warning(monkeypatch):
    def rows(benchmark, side):
        if benchmark.name == "gpqa":
            raise ValueError("--data gpqa: gated")
        return rows_of(benchmark.name)

    monkeypatch.setattr(benchmarks, "_rows", rows)
    with pytest.warns(UserWarning, match="no out-of-distribution test: --data gpqa: gated"):
        task, manifest = load_task("scienceqa")
    assert task.ood == [] and manifest["ood"] == {"data": "gpqa", "error": "--data gpqa: gated"}


# --- scorers ---------------------------------------------------------------------------------------------------------

OPTIONS = ["Paris", "Lyon", "Nice", "Lille"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A square has four sides", None),
        ("A square ... Answer: A ... no, Answer: B", "B"),
        ("It has four.\nAnswer: B", "B"),
        ("**Answer: (b)**", "B"),
        ("**Answer:** B", "B"),
        ("The answer is B.", "B"),
        ("The answer is 'B'.", "B"),
        ("The correct option is (C)", "C"),
        ("Option D is correct.", "D"),
        ("I choose D", "D"),
        ("so \\boxed{B}", "B"),
        ("$\\boxed{\\text{C}}$", "C"),
        ('{"answer": "B"}', "B"),
        ("It is this:\nB", "B"),
        ("It is this:\n(B)", "B"),
        ("It is this:\nB.", "B"),
        ("It is this:\n**B. Lyon**", "B"),
        ("It is this:\nB. Paris", None),
        ("Answer: B. because A is wrong", "B"),
        ("Answer: B, C and D are wrong", "B"),
        ("Answer: B. A is wrong.", "B"),
        ("Answer: A or B", None),
        ("Answer: A, B", None),
        ("Answer: (A) or (B)", None),
        ("Answer: A or B is right", None),
        ("Answer: B, C or D are wrong", "B"),
        ("Answer: A (or B)", None),
        ("Answer: B (not A)", "B"),
        ("Answer: B (A is wrong)", "B"),
        ("Answer: A\nAnswer: A and B", None),
        ("Answer: E", None),
        ("Answer: A\nAnswer: E", "A"),
        ("The answer is a mammal", None),
        ("The answer is A mammal", None),
        ("The answer is a.", "A"),
        ("Answer: A because it is", "A"),
        ("Answer: A Paris", "A"),
        ("Answer: B-cells", None),
        ("The answer is not B", None),
        ("A is wrong. B is right? C, D ...", None),
        ("Answer: B" + " " * 30000 + "x", "B"),
        ("answer: " + "\n" * 30000, None),
        ("", None),
    ],
)
def test_choice(text, said):
    for letter in "AB":
        r = score(Example("t", "q", "r", {"kind": "choice", "letter": letter, "options": OPTIONS}), text)
        assert (r["said"], r["correct"], r["abstained"]) == (said, said == letter, said is None)
        assert r["strict"] is (r["correct"] and text.endswith(f"\nAnswer: {letter}"))


@pytest.mark.parametrize(
    ("text", "value", "strict"),
    [
        ("48 + 24\n#### 72", "72", True),
        ("#### $1,200.50", "1200.5", True),
        ("#### -3.", "-3", True),
        ("#### 25%", "25", True),
        ("#### 5\n#### 6", "6", True),
        ("#### 72 apples", "72", False),
        ("####\n72", "72", False),
        ("The answer is 12. There were 5.", "12", False),
        ("answer: **$1,200**.", "1200", False),
        ("so \\boxed{42}", "42", False),
        ("3 of 4, so 5", "5", False),
        ("10 - 4", "4", False),
        ("x=−4", "-4", False),
        ("1,234,567", "1234567", False),
        ("7, not 3/4", "7", False),
        ("half of it is .5", "0.5", False),
        ("1/2", None, False),
        ("none at all", None, False),
    ],
)
def test_number(text, value, strict):
    e = Example("t", "q", "r", {"kind": "number", "value": value or "1", "mark": "####"})
    assert score(e, text) == {"correct": value is not None, "abstained": value is None, "strict": strict}
    assert not score(Example("t", "q", "r", {"kind": "number", "value": "99", "mark": "####"}), text)["correct"]


def test_what_is_a_number():
    assert [str(as_number(t)) for t in ("$1,200.50", " -3 ", "25 %", "3/4", "x", "1 2", "1,2")] == [
        "1200.50",
        "-3",
        "25",
        "None",
        "None",
        "None",
        "None",
    ]


def test_text():
    e = Example("t", "q", "r", {"kind": "text", "value": "New-York", "mark": "Answer:"})
    r = [score(e, t) for t in ("It is big.\nAnswer: new york.", "The answer is **New York**", "so\nNew York", "York", "")]
    assert [x["correct"] for x in r] == [True, True, True, False, False] and [x["strict"] for x in r] == [True] + [False] * 4
    assert [x["abstained"] for x in r] == [False] * 4 + [True]


def call(action, arguments):
    return f"Action: {action}\nAction Input: {arguments if isinstance(arguments, str) else json.dumps(arguments)}\n"


GOLD = [{"action": "send", "arguments": {"city": "Oslo", "count": 1}}]


@pytest.mark.parametrize(
    ("gold", "text", "action", "arguments", "penalised", "correct"),
    [
        (GOLD, "Thought: so.\n" + call("send", {"count": 1.0, "city": "Oslo"}), 1, 1, 1, True),
        (GOLD, '**Action:** send\n**Action Input:**\n```json\n{\n "city": "Oslo",\n "count": 1}\n```', 1, 1, 1, True),
        (GOLD, call("send", {"city": "Oslo", "count": 1}) + "Observation: done", 1, 1, 1, True),
        (GOLD, call("send", {"city": "Oslo", "count": 1, "size": ""}), 1, 1, 1, True),
        (GOLD, call("send", {"city": "Oslo", "count": 1, "size": "big"}), 1, 1, 2 / 3, False),
        (GOLD, call("send", {"city": "Oslo", "count": "1"}), 1, 0.5, 0.5, False),
        (GOLD, call("send", {"city": "Oslo", "count": True}), 1, 0.5, 0.5, False),
        (GOLD, call("find", {"city": "Oslo", "count": 1}), 0, 1, 1, False),
        (GOLD, call("send", "{'city': 'Oslo', 'count': 1}"), 1, 0, 0, False),
        (GOLD, call("send", "[1]"), 1, 0, 0, False),
        (GOLD, call("send", ""), 1, 0, 0, False),
        (GOLD, call("send", "[" * 100000), 1, 0, 0, False),
        (GOLD, call("send", GOLD[0]["arguments"]) * 2, 0, 0.5, 0.5, False),
        (GOLD * 2, call("send", GOLD[0]["arguments"]), 0, 0.5, 0.5, False),
        (GOLD, json.dumps({"tool_calls": [{"Action": "send", "Action_Input": GOLD[0]["arguments"]}]}), 1, 1, 1, True),
        (GOLD, json.dumps({"tool_calls": [{"Action": "send", "Action_Input": json.dumps(GOLD[0]["arguments"])}]}), 1, 1, 1, True),
        (GOLD, '```json\n{"tool_calls": [{"name": "send", "arguments": {"city": "Oslo", "count": 1}}]}\n```', 1, 1, 1, True),
        (GOLD, '{"tool_calls": [3]}', 0, 0, 0, False),
        (GOLD, "I would send it to Oslo.", 0, 0, 0, False),
        ([{"action": "list", "arguments": {}}], call("list", {}), 1, 1, 1, True),
        ([{"action": "list", "arguments": {"page": ""}}], call("list", {"page": 3}), 1, 0, 0, False),
        ([{"action": "list", "arguments": {}}], call("list", "nothing"), 1, 0, 0, False),
        ([{"action": "set", "arguments": {"on": True}}], call("set", {"on": 1}), 1, 0, 0, False),
    ],
)
def test_tools(gold, text, action, arguments, penalised, correct):
    r = score(Example("t", "q", "r", {"kind": "tools", "calls": gold, "actions": []}), text)
    assert (r["action"], r["arguments"], r["arguments_penalised"]) == pytest.approx((action, arguments, penalised))
    assert r["correct"] is correct and r["both"] is (action == arguments == 1)
    assert r["strict"] is (correct and "tool_calls" not in text)
    assert r["abstained"] is (text.startswith("I would") or "[3]" in text)


WITH = json.dumps(GOLD[0]["arguments"])


@pytest.mark.parametrize(
    "text",
    [
        f"- Action: send\n- Action Input: {WITH}",
        f"### Action: send\n### Action Input: {WITH}",
        f"**Action**: send\n**Action Input**: {WITH}",
        f"1. Action: send\n2. Action Input: {WITH}",
        f"action: send\naction_input: {WITH}",
        f"Action: send\nAction Input:\n```JSON\n{WITH}\n```",
        f'```JSON\n{{"tool_calls": [{{"name": "send", "arguments": {WITH}}}]}}\n```',
        f'{{"name": "send", "arguments": {WITH}}}',
        f'[{{"action": "send", "action_input": {WITH}}}]',
        f'{{"type": "function", "function": {{"name": "send", "arguments": {json.dumps(WITH)}}}}}',
        f'I send it.\n<tool_call>\n{{"name": "send", "arguments": {WITH}}}\n</tool_call>',
        f'<tool_call>\n```json\n{{"name": "send", "arguments": {WITH}}}\n```\n</tool_call>',
        f'<TOOL_CALLS>[{{"name": "send", "arguments": {WITH}}}]</TOOL_CALLS>',
        f'[TOOL_CALLS] [{{"name": "send", "arguments": {WITH}}}]',
        f'I send it, see [1]:\n{{"name": "send", "arguments": {WITH}}}\nIt returns {{"ok": true}}.',
        f'{{"Action": "send", "Action Input": {WITH}}}',
        f"• Action: send\n• Action Input: {WITH}",
        f"Action：send\nAction Input：{WITH}",
        f"### Action:\nsend\n### Action Input:\n~~~json\n{WITH}\n~~~",
    ],
)
def test_a_call_in_another_dress(text):
    e = Example("t", "q", "r", {"kind": "tools", "calls": GOLD, "actions": []})
    assert score(e, text)["correct"] and not score(e, text.replace("send", "find"))["correct"]


def test_what_reads_like_a_call_inside_of_an_argument_is_none():
    e = Example("t", "q", "r", {"kind": "tools", "calls": [{"action": "send", "arguments": SENT}], "actions": []})
    assert score(e, call("send", SENT))["correct"]
    assert score(e, json.dumps({"name": "send", "arguments": SENT}))["correct"]
    one = json.dumps({"name": "send", "arguments": SENT})  # a second call counts, and one that cannot be read makes all void
    assert [len(scoring.structured_calls(text)) for text in (f"{one}\n{one}", one + one[:-1], "{}", '{"x": 1}')] == [2, 0, 0, 0]
    broken = "Action: a\nAction Input: {'x': 'Action: b Action Input: {}'}\n"
    assert [c["action"] for c in scoring.react_calls(broken + call("c", {}))] == ["a", "c"]


def test_lenient_is_the_official_reading_of_arguments():
    e = Example("t", "q", "r", {"kind": "tools", "calls": GOLD, "actions": []})
    r = score(e, call("send", {"city": "Oslo ", "count": "1", "size": "big"}))
    assert r["lenient"] and not r["both"] and not r["correct"]


def test_json_equality():
    assert same(1, 1.0) and same({"a": [1, None]}, {"a": [1.0, None]}) and same(True, True)
    assert not any(
        (
            same(True, 1),
            same(True, "True"),
            same(0, False),
            same("1", 1),
            same([1], [1, 2]),
            same({"a": 1}, {"b": 1}),
            same([True], [1]),
        )
    )


CODE = {"kind": "code", "entry": "f", "tests": ["assert f(2) == 4", "assert f(3) == 6"], "prelude": "import math"}
GOOD, BAD = "def f(x):\n    return x + x\n", "def f(x):\n    return x * x\n"


def fenced(code, language="python"):
    return f"```{language}\n{code}```\n"


def test_code():
    table = [
        (fenced(GOOD), True, False, True),
        (f"Here it is.\n{fenced(GOOD)}It adds.", True, False, True),
        (fenced(BAD) + "No, better:\n" + fenced(GOOD), True, False, False),
        (fenced(GOOD) + "No, better:\n" + fenced(BAD), False, False, False),
        (fenced(GOOD) + "Use it:\n" + fenced("print(f(2))\n"), True, False, False),
        (fenced(GOOD, ""), True, False, False),
        (fenced(BAD, "") + fenced(GOOD), True, False, False),
        (fenced(BAD) + fenced(GOOD, "text"), False, False, False),
        (
            "1. So:\n" + fenced(GOOD).replace("```", "  ```").replace("\nd", "\n  d").replace("\n    r", "\n      r"),
            True,
            False,
            True,
        ),
        (GOOD, True, False, False),
        ("```python\n" + GOOD, True, False, False),
        (fenced(GOOD.replace("def f", "def g")), False, True, False),
        (fenced("f = lambda x: 2 * x\n"), True, False, True),
        (fenced("def f(x):\n    return (\n"), False, False, False),
        (fenced("def f(x):\n    return int(math.ldexp(x, 1))\n"), True, False, True),
        (fenced("class Same:\n    __eq__ = lambda a, b: True\ndef f(x):\n    return Same()\n"), False, False, False),
        (fenced(GOOD + "import os\nos._exit(0)\n"), False, False, False),
        ("def f(x) returns x + x", False, False, False),
        ("Add x to itself.", False, True, False),
        ("\0", False, True, False),
        ("", False, True, False),
    ]
    results = score_all([Example("t", "q", "r", CODE)] * len(table), [text for text, *_ in table])
    for (text, *wanted), r in zip(table, results, strict=True):
        assert [r["correct"], r["abstained"], r["strict"]] == wanted, text
        assert r["reason"] == "passed" or not r["correct"]


HELPER, USER = "def g(x):\n    return x + x\n", "def f(x):\n    return g(x)\n"
DOC = 'def f(x):\n    """Doubles.\n    ```python\n    f(1)\n```\n    """\n    return x + x\n'
WRAPPED = {  # where a program begins and ends: a right one, and whether it is also in the format that was asked for
    "closed on the last line": ("```python\n" + GOOD.strip() + "```\nIt adds.", False),
    "closed on the last line, twice": ("```python\n" + GOOD.strip() + "```\nUse it:\n```python\nprint(f(2))```", False),
    "marks in a docstring": (fenced(DOC), True),
    "marks in a docstring, no fence": (DOC, False),
    "marks in a comment": (fenced("# between ``` and ```\n" + GOOD + "# ```\n"), True),
    "marks in a string": (fenced('MARK = "```"\n' + GOOD), True),
    "tildes": ("~~~python\n" + GOOD + "~~~\nIt adds.", False),
    "tildes, never closed": ("~~~python\n" + GOOD, False),
    "four marks": ("````python\n" + DOC + "````\n", True),
    "a fence in a fence": ("````markdown\n# So\n" + fenced(GOOD) + "````\n", True),
    "the next fence closes it": ("```python\n" + GOOD + fenced("print(f(2))\n"), False),
    "in the middle of a line": ("Sure: " + fenced(GOOD), False),
    "in one line": ("```python def f(x): return x + x```", False),
    "carriage returns": (fenced(GOOD).replace("\n", "\r\n"), True),
    "in a list": ("- So:\n" + textwrap.indent(fenced("def f(x):\n    s = '```'\n\n    return x + x\n"), "  "), True),
    "another language first": (fenced("pip install x\n", "bash") + fenced(GOOD), False),
    "prose around, no fence": ("Here it is:\n\n" + GOOD + "\nIt adds x to itself.", False),
    "prose behind, never closed": ("```python\n" + GOOD + "\nIt adds x to itself.", False),
    "__future__": (fenced("from __future__ import annotations\n" + GOOD), True),
    "__future__ behind a docstring": (fenced("'''So.'''\nfrom __future__ import annotations\n" + GOOD), True),
    "__future__ in the second fence": (fenced(HELPER) + fenced("from __future__ import annotations\n" + USER), False),
    "with a type": (fenced("from typing import Callable\nf: Callable = lambda x: x + x\n"), True),
    "two at once": (fenced("f, g = (lambda x: x + x), 3\n"), True),
    "if": (fenced("if True:\n    def f(x): return x + x\nelse:\n    f = None\n"), True),
    "try": (fenced("try:\n    from nowhere import f\nexcept ImportError:\n    def f(x): return x + x\n"), True),
    "for": (fenced("for k in [2]:\n    f = lambda x: x * k\n"), True),
    "walrus": (fenced("(f := lambda x: x + x)\n"), True),
    "what it imports": (fenced("from functools import partial\nfrom operator import mul\nf = partial(mul, 2)\n"), True),
    "helpers first": (fenced(HELPER) + "Then:\n" + fenced(USER), False),
    "helpers last": (fenced(USER) + "With:\n" + fenced(HELPER + "print(f(2))\n"), False),
    "helpers of helpers": (fenced("K = 2\n") + fenced("def g(x): return K * x\n") + fenced(USER), False),
    "imports first": (fenced("from operator import *\n") + fenced("def f(x): return mul(x, 2)\n"), False),
    "a helper in a draft": (fenced(HELPER + BAD) + "Better:\n" + fenced(USER), False),
    "an example that is not needed": (fenced("x = input()\nprint(x)\n") + fenced(GOOD), False),
}  # fmt: skip


def test_the_parser_says_where_a_program_begins_and_ends():
    results = score_all([Example("t", "q", "r", CODE)] * len(WRAPPED), [text for text, _ in WRAPPED.values()])
    for (name, (_, strict)), r in zip(WRAPPED.items(), results, strict=True):
        assert (r["correct"], r["strict"], r["reason"]) == (True, strict, "passed"), name
    wrong = [text.replace("x + x", "x * x").replace("x * 2", "x - 2") for text, _ in WRAPPED.values() if "x + x" in text]
    assert not any(r["correct"] or r["abstained"] for r in score_all([Example("t", "q", "r", CODE)] * len(wrong), wrong))


def test_negatives_of_a_reference_in_two_fences_change_one_of_them():
    example = Example("t", "q", fenced(HELPER) + "Then:\n" + fenced(USER.replace("g(x)", "g(x) + 0")), CODE)
    (e,), counts = add_negatives([example], 0)
    assert counts["found"] == 1 and e.negative.startswith(fenced(HELPER) + "Then:\n") and not score(e, e.negative)["correct"]


def humaneval_like(before, name, body, check):
    """An invented record whose prompt has helpers of its own, as HumanEval/32, /38 and /50 have."""
    prompt = f'{before}\n\ndef {name}(x):\n    """ Not like def {name}(x):\n    >>> {name}(1)\n    """\n'
    row = dict(prompt=prompt, entry_point=name, canonical_solution=body, test=f"def check(candidate):\n    {check}\n")
    return BENCHMARKS["humaneval"].to_example(row, 0, 0)


@pytest.mark.slow
def test_an_answer_cannot_replace_the_helpers_of_a_prompt():
    poly = "from __future__ import annotations\nimport math\n\n\ndef poly(xs: list, x):\n"
    poly += "    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n"
    code = "@staticmethod\ndef encode(s):\n    return s[::-1]\n"
    root = humaneval_like(poly, "root", "    return -x[0] / x[1]\n", "assert abs(poly([2, 4], candidate([2, 4]))) < 1e-4")
    decode = humaneval_like(code, "decode", "    return encode(x)\n", "assert candidate(encode('abc')) == 'abc'")
    tables = [
        (root, "def root(x): return 7\n", "poly", "lambda *a: 0"),
        (decode, "def decode(x): return x\n", "encode", "lambda s: s"),
    ]
    for example, wrong, helper, forged in tables:
        assert example.answer["prelude"] == example.answer["tests"][0] and score(example, example.reference)["strict"]
        for name in (helper, "abs", "sum", "math", "enumerate", "check"):
            for text in (
                f"{name} = {forged}\n{wrong}",
                f"{wrong}{name} = {forged}\n",
                f"import builtins\nbuiltins.{name} = {forged}\n{wrong}",
            ):
                assert not score(example, fenced(text))["correct"], text
    own = "def poly(xs, x): return 0\ndef root(x): return -x[0] / x[1]\n"  # its own helper, for its own use
    assert score(root, fenced(own))["correct"]


def test_the_entry_is_what_is_tested_and_not_the_abs_around_it():
    row = dict(
        text="Add.",
        test_list=["assert abs(sum(2, 2) - 4) < 1e-6"],
        code="def abs(x): return max(x, -x)\ndef sum(a, b): return a + b",
    )
    e = BENCHMARKS["mbpp"].to_example(row, 0, 0)
    assert e.answer["entry"] == "sum" and "def sum(a, b):" in e.question and "def abs" not in e.question
    forged = fenced("def abs(x): return 0\ndef sum(a, b): return 99\n")
    assert score(e, e.reference)["correct"] and not score(e, forged)["correct"]


def test_degenerate_completions_neither_crash_nor_hang():
    """A broken model repeats itself for pages. Nested unbounded repeats in a pattern would take minutes for each of these."""
    answers = [
        {"kind": "choice", "letter": "A", "options": OPTIONS},
        {"kind": "number", "value": "7", "mark": "####"},
        {"kind": "text", "value": "?", "mark": "Answer:"},
        {"kind": "tools", "calls": GOLD, "actions": []},
        CODE | {"entry": "nowhere"},
    ]
    pieces = '|Answer: |Action: |\n|A or |\\boxed{|```\n|((|- |1,|[{"|\0\ud800|٣'.split("|")
    begun = time.process_time()
    for piece in pieces:
        for start in ("", "Answer:", "Action: x\nAction Input:", "```python\n"):
            assert not any(score(Example("t", "q", "r", a), start + piece * 5000)["correct"] for a in answers)
    assert time.process_time() - begun < 10


def test_kinds():
    nothing = {"correct": False, "abstained": True, "strict": False}
    assert score(Example("t", "q", "r"), "whatever") == nothing
    with pytest.raises(ValueError, match="another kind"):
        score(Example("sum", "q", "r", "85"), "85")
    with pytest.raises(ValueError):
        score_all([Example("t", "q", "r")], [])


def test_what_is_right_in_another_form_is_right_but_not_strictly():
    e = Example("gsm8k", "q", "r", {"kind": "number", "value": "4", "mark": "####"})
    (result,) = score_all([e], ["so it is 4"])
    assert {"correct", "abstained", "strict"} <= set(result) and result["correct"] and not result["strict"]
