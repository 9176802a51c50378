"""Your own file: every kind of line is read right, a bad one costs nothing but itself, and what is odd is named."""

import json
import re
import warnings

import pytest

import eval as evaluate
import train
from engine import metrics
from engine.config import parse
from tasks.data import Example
from tasks.jsonl import in_short, is_file, line_example, load_jsonl
from tasks.scoring import score_all

OPTIONS = ["Paris", "Lyon", "Nice", "Lille"]
GOOD, BAD = "def f(x):\n    return x + x\n", "def f(x):\n    return x * x\n"
TESTS = ["assert f(2) == 4", "assert f(3) == 6"]


def fenced(code):
    return f"```python\n{code}```\n"


def write(tmp_path, *lines, name="mine.jsonl", end="\n"):
    path = tmp_path / name
    path.write_bytes(end.join(x if isinstance(x, str) else json.dumps(x) for x in lines).encode())
    return path


def line(question, **more):
    return dict(question=question, reference="Because it is so.", **more)


def by_question(task):
    start = "Write Python code for this task.\n\n"
    return {e.question.removeprefix(start).split("\n")[0]: e for e in task.train + task.test}


def test_every_kind_of_line(tmp_path):
    path = write(
        tmp_path,
        line("letter", choices=OPTIONS, answer="c"),
        line("index", choices=OPTIONS, answer=3),
        line("option", choices=["B", "A"], answer="A"),
        line("number", answer=1200),
        line("amount", answer="$1,200.50"),
        line("word", answer="Oslo"),
        line("other word", answer="Lima", context=None),
        dict(question="double", reference=GOOD, tests=TESTS),
        dict(question="thrice", reference="So:\n" + fenced("def g(x):\n    return 3 * x\n"), tests=["assert g(1) == 3"]),
        line("unscored", context="Read this first."),
        dict(question="ended", reference="It is so.\nAnswer: Nice", answer="Nice"),
    )
    task, manifest = load_jsonl(path, test_share=0.3)
    e = by_question(task)
    assert e["letter"].answer == {"kind": "choice", "letter": "C", "options": OPTIONS}
    assert e["index"].answer["letter"] == "D" and e["option"].answer["letter"] == "B"
    assert e["letter"].reference == "Because it is so.\n\nAnswer: C" and "C. Nice" in e["letter"].question
    assert e["number"].answer == {"kind": "number", "value": "1200", "mark": "Answer:"}
    assert e["word"].reference == "Because it is so.\n\nAnswer: Oslo" and e["ended"].reference.endswith("so.\nAnswer: Nice")
    assert e["double"].reference == f"```python\n{GOOD.strip()}\n```" and e["double"].answer["entry"] == "f"
    assert e["thrice"].reference.startswith("So:\n```python") and "def g(x):" in e["thrice"].question
    assert e["Context: Read this first."].answer is None
    assert manifest["kinds"] == {"choice": 3, "number": 2, "text": 3, "code": 2, "unscored": 1}
    assert "not scored" in manifest["note"]
    assert (manifest["train"], manifest["test"]) == (8, 3) and manifest["bad_lines"] == {} and task.name == "mine"
    scored = [x for x in task.train + task.test if x.answer]
    assert all(r["correct"] and r["strict"] for r in task.score(scored, [x.reference for x in scored]) if "reason" not in r)
    assert all(r["correct"] for r in task.score(scored, [x.reference for x in scored]))
    assert not any(r["correct"] for r in task.score(scored, [x.negative for x in scored]))
    json.dumps(manifest)


BAD_LINES = [
    ("{not json", "not JSON"),
    ("[1, 2]", "not a JSON object but a list"),
    ('{"question": "q"}', "field 'reference' is missing"),
    (line(""), "field 'question' is empty"),
    (line(["q"]), "field 'question' must be a text, but is of type list"),
    (dict(question="q", reference="  "), "field 'reference' is empty"),
    (line("q", choices=OPTIONS, answer="Rome"), "the answer 'Rome' is not among the choices"),
    (line("q", choices=OPTIONS, answer="E"), "the answer 'E' is not among the choices"),
    (line("q", choices=OPTIONS, answer=4), "the answer 4 is not among the choices"),
    (line("q", choices=OPTIONS, answer=True), "the answer True is not among the choices"),
    (line("q", choices=OPTIONS), "field 'answer' is missing"),
    (line("q", choices=["Paris", "paris"], answer="A"), "two choices are the same"),
    (line("q", choices=["Paris"], answer="A"), "fewer than two"),
    (line("q", choices=[1, 2], answer="A"), "an item of field 'choices' must be a text, but is of type int"),
    (line("q", choices="AB", answer="A"), "field 'choices' must be a list"),
    (line("q", tests=[]), "field 'tests' must be a list"),
    (line("q", tests=["assert f(1) =="]), "not Python"),
    (line("q", tests=["assert f(1)"]), "not Python"),
    (dict(question="q", reference=GOOD, tests=["assert g(1)"]), "the tests use nothing"),
    (line("q", choices=OPTIONS, answer="A", tests=["assert 1"]), "exclude each other"),
    (line("q", answer=[1]), "field 'answer' must be a text, but is of type list"),
    (line("q", answer=False), "field 'answer' must be a text, but is of type bool"),
    (line("q", answer=" "), "field 'answer' is empty"),
    (line("q", answer="one\ntwo"), "one short line"),
    ('{"question": "q", "reference": "r", "answer": NaN}', "not a finite number"),
    (line("q", negative=3), "field 'negative' must be a text, but is of type int"),
    (line("q", split="dev"), "field 'split' must be"),
    ('{"question": "q\\ud800", "reference": "r"}', "surrogate"),
    (dict(question="q", reference="Answer: Lima", answer="Oslo"), "the reference ends in 'Answer: Lima', which is not the answer"),
    ("[" * 100000, "not JSON"),
]


def test_a_reference_in_code_is_read_by_the_parser():
    """In two fences, of which the first has the helper; bare, with marks in its docstring; behind the fence of another language."""
    helper, user = "def g(x):\n    return x + x\n", "from __future__ import annotations\ndef f(x):\n    return g(x)\n"
    marks = 'def f(x):\n    """\n```python\n    f(1)\n```\n    """\n    return x + x'
    shell = "```bash\npip install x\n```\n"
    for reference in (f"{fenced(helper)}\nThen:\n{fenced(user)}", marks, shell + fenced(marks + "\n")):
        e = line_example({"question": "Double it.", "reference": reference, "tests": ["assert f(2) == 4"]})
        assert e.answer["entry"] == "f" and "def f(x)" in e.question and "g(x)" not in e.question
        assert score_all([e], [e.reference])[0]["correct"], e.reference


def test_bad_lines_are_reported_by_number_and_cost_nothing_else(tmp_path):
    good = [line(f"question {i}", answer=i) for i in range(5)]
    path = write(tmp_path, "", *good[:2], *(bad for bad, _ in BAD_LINES), "   ", *good[2:])
    with pytest.warns(UserWarning, match=r"30 of 35 lines are left out: line 4: not JSON"):
        task, manifest = load_jsonl(path)
    assert len(task.train) == 4 and len(task.test) == 1
    told = {number: reason for reason, numbers in manifest["bad_lines"].items() for number in numbers}
    assert sorted(told) == list(range(4, 4 + len(BAD_LINES)))
    for number, (bad, reason) in enumerate(BAD_LINES, 4):
        assert reason in told[number], (bad, told[number])


def test_lines_that_are_bad_for_one_reason_are_named_together(tmp_path):
    path = write(tmp_path, *(line(f"q{i}", answer=i) for i in range(5)), *(dict(question="q") for _ in range(20)))
    with pytest.warns(UserWarning, match=r"lines 6, 7, 8, 9, 10, 11, 12, 13, ... \(20 in all\): field 'reference'"):
        load_jsonl(path)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [json.dumps(line(f"größe {i}", answer="ä\u2028ö"), ensure_ascii=False).encode() for i in range(3)]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([lines[0], b"\xff\xfe", lines[1], b"", lines[2], b""]))
    with pytest.warns(UserWarning, match="1 of 4 lines are left out: line 2: not UTF-8"):
        task, _ = load_jsonl(path)
    assert len(task.train + task.test) == 3 and "größe" in task.train[0].question


def test_unknown_fields_are_named_once(tmp_path):
    path = write(tmp_path, *(line(f"q{i}", answer=i, hint="h", id=i) for i in range(4)))
    with pytest.warns(UserWarning) as caught:
        _, manifest = load_jsonl(path)
    assert len(caught) == 1 and "unknown fields hint, id are ignored" in str(caught[0].message)
    assert manifest["unknown_fields"] == ["hint", "id"]


def test_the_split(tmp_path):
    lines = [line(f"q{i}", answer=i) for i in range(20)]
    path = write(tmp_path, *lines, lines[3], lines[7])
    a, b = load_jsonl(path)[0], load_jsonl(path)[0]
    assert a.train == b.train and a.test == b.test and a.fingerprint() == b.fingerprint()
    assert not {e.question for e in a.train} & {e.question for e in a.test} and len(a.train + a.test) == 22
    assert load_jsonl(path, seed=1)[0].test == a.test  # or a run would be tested on what another was trained on
    asked = [int(e.question.split("\n")[0][1:]) for e in a.train]
    assert asked[: len(set(asked))] == sorted(set(asked))  # the order of the file

    path = write(tmp_path, *(dict(x, split="test" if i in (2, 5) else "train") for i, x in enumerate(lines[:9])), lines[9])
    task, manifest = load_jsonl(path)
    assert [e.question.split("\n")[0] for e in task.test] == ["q2", "q5"] and manifest["train"] == 8


def test_given_negatives(tmp_path):
    path = write(
        tmp_path,
        line("given", choices=OPTIONS, answer="A", negative="It is Lyon.\n\nAnswer: B", split="train"),
        line("right", choices=OPTIONS, answer="A", negative="Answer: A", split="train"),
        line("free", negative="It is not so.", split="train"),
        dict(question="code", reference=GOOD, tests=TESTS, negative=BAD, split="train"),
        line("test", split="test"),
    )
    e = by_question(load_jsonl(path)[0])
    assert e["given"].negative == "It is Lyon.\n\nAnswer: B" and e["free"].negative == "It is not so."
    assert e["right"].negative not in ("", "Answer: A") and e["code"].negative == f"```python\n{BAD.strip()}\n```"


@pytest.mark.parametrize(
    ("lines", "how", "message"),
    [
        ([], {}, "no line can be used .the file is empty"),
        (["{", "[]"], {}, "no line can be used .line 1: not JSON.*line 2: not a JSON object"),
        ([line("q", answer=1)], {}, "nothing to train on; it needs two different questions"),
        ([line("q", answer=1, split="train")], {}, "nothing to test; give both sides a line"),
        ([line("q", answer=1)], {"test_share": 0.0}, "test_share 0.0 must lie between 0 and 1"),
    ],
)
def test_a_file_that_cannot_serve_is_one_line(tmp_path, lines, how, message):
    with pytest.raises(ValueError, match=message) as error:
        load_jsonl(write(tmp_path, *lines), **how)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "nothing.jsonl", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            load_jsonl(path)


def test_a_file_in_another_form_says_which(tmp_path):
    records = [line("q1", answer=1), line("q2", answer=2)]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-16")
    for name, said in (("a.json", "one JSON array"), ("b.jsonl", "UTF-16")):
        with pytest.raises(ValueError, match=said):
            load_jsonl(tmp_path / name)
    assert is_file("x/My.JSONL") and is_file("a.json") and not is_file("tiny") and not is_file("mbpp-sanitized")


def test_what_is_odd_is_used_and_named(tmp_path):
    path = write(
        tmp_path,
        line("twice", answer=1, split="train"),
        line("twice", answer=1, split="train"),
        line("torn", answer=1, split="train"),
        line("torn", answer=2, split="train"),
        line("leaks", answer=3, split="train"),
        line("leaks", answer=3, split="test"),
        dict(question="code", reference=BAD, tests=TESTS, split="train"),
        dict(question="more code", reference=BAD, tests=TESTS, split="test"),
        dict(question="good code", reference=GOOD, tests=TESTS, split="train"),
    )
    with pytest.warns(UserWarning) as caught:
        task, manifest = load_jsonl(path)
    assert manifest["odd_lines"] == {
        "the same question and reference again": [2, 6],
        "the same question with different answers": [3, 4],
        "the same question to train on and to test": [5, 6],
        "the reference fails its own tests": [7, 8],
    }
    assert {str(w.message).split(": ", 1)[1] for w in caught} == {
        "lines 2, 6: the same question and reference again",
        "lines 3, 4: the same question with different answers",
        "lines 5, 6: the same question to train on and to test",
        "lines 7, 8: the reference fails its own tests",
    }
    assert len(task.train) == 7 and len(task.test) == 2
    assert in_short(manifest).endswith(": 6 number, 3 code; 7 to train on, 2 held out; wrong references for 6 of 7")
    with warnings.catch_warnings():  # without negatives no code is run
        warnings.simplefilter("ignore")
        assert "negatives" not in load_jsonl(path, negatives=False)[1]


def test_sizes_take_the_first(tmp_path):
    path = write(tmp_path, *(line(f"q{i}", answer=i) for i in range(20)))
    whole = load_jsonl(path)[0]
    with pytest.warns(UserWarning) as said:
        few = load_jsonl(path, train_size=3, test_size=2)
    assert "3 of 16 training lines are used (--train-size; 0 = all)" in str(said[0].message)
    assert "2 of 4 held-out lines are used (--eval-size" in str(said[1].message)
    questions = lambda part: [e.question for e in part]
    assert questions(few[0].train) == questions(whole.train[:3]) and few[0].test == whole.test[:2]
    assert (few[1]["train"], few[1]["test"]) == (3, 2) and all(isinstance(e, Example) for e in few[0].train)


# --- through the commands


SHORT = ["--steps", "1", "--batch", "2", "--max-new-tokens", "8", "--device", "cpu"]


def run(data, out, *flags):
    return train.main(parse(["--data", str(data), "--out", str(out), *SHORT, *flags]))


@pytest.mark.slow
def test_a_lone_line_of_a_kind_trains_beside_the_others(tmp_path, no_picture):
    path = write(
        tmp_path,
        line("number", answer=1, split="train"),
        dict(question="code", reference=GOOD, tests=TESTS, split="train"),
        line("other", answer=1, split="test"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(path, tmp_path / "a")["steps"] == 1
        manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
        assert (manifest["too_long"], manifest["references_cut"]) == (0, 0)
        path = write(tmp_path, line("q", answer=1, split="train"), line("other", answer=1, split="test"))
        with pytest.raises(ValueError, match="need 1 other training questions, and there are 0.*--agreement none"):
            run(path, tmp_path / "b")
        assert run(path, tmp_path / "c", "--agreement", "none")["steps"] == 1


@pytest.mark.slow
def test_questions_that_are_too_long_are_left_out_on_both_sides(tmp_path, capsys, no_picture):
    long = "word " * 1000
    lines = [line(f"q{i} " + long * (i % 4 == 0), answer=i, split="test" if i > 5 else "train") for i in range(9)]
    with pytest.warns(UserWarning, match="1 of 3 held-out questions are left out, first 'q8 word"):
        summary = run(write(tmp_path, *lines), tmp_path / "a", "--recipe", "sd")
    captured = capsys.readouterr()
    assert "2 questions are left out" in captured.out and "indexing errors" not in captured.err
    assert summary["after"]["interval"]["number"][1] == pytest.approx(metrics.wilson(0, 2)[1])
    assert evaluate.main(["--model", "tiny", "--data", str(tmp_path / "mine.jsonl"), "--max-new-tokens", "8"]) == 0
    assert "2 questions" in capsys.readouterr().out
    only = write(tmp_path, *(line(f"q{i} {long}", answer=i) for i in range(4)))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no held-out question fits"):
        run(only, tmp_path / "b", "--recipe", "sd")


@pytest.mark.slow
def test_without_answers_nothing_is_called_wrong(tmp_path, capsys):
    path, out = write(tmp_path, *(line(f"q{i}") for i in range(6))), tmp_path / "a"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="the tiny model has never met")
        summary = run(path, out, "--recipe", "sd", "--teacher-every", "1")
    assert summary["after"]["accuracy"] is None and summary["after"]["by_task"] == {"unscored": None}
    assert "accuracy not scored -> not scored" in capsys.readouterr().out and (out / "curves.png").exists()
    assert "NaN" not in (out / "summary.json").read_text() + (out / "log.jsonl").read_text()
    flags = ["--model", str(out), "--base", "tiny", "--data", str(path), "--out", str(tmp_path / "e")]
    assert evaluate.main(flags) == 0
    told = capsys.readouterr().out
    assert "not scored" in told and "points" not in told and "jsd_to_base" in told
    assert "length 8.0 tokens" in told  # the run's own limit


def test_the_tiny_model_says_how_much_of_other_text_it_knows(tmp_path, no_picture):
    path = write(tmp_path, *(line(f"where is penguin number {i}") for i in range(6)))
    with pytest.warns(UserWarning, match=r"never met (\d+) per cent of the words of \w+.*SmolLM2-135M") as told:
        run(path, tmp_path / "a", "--recipe", "sft", "--steps", "1")
    (share,) = (int(re.search(r"met (\d+) per cent", str(w.message))[1]) for w in told if "never met" in str(w.message))
    assert share == 50  # "penguin", "number", "Because" and "it", of eight words


def test_a_mixed_file_is_judged_by_what_has_answers(tmp_path, no_picture):
    lines = [line("a", answer=1, split="test"), line("b", split="test"), line("c", split="train")]
    summary = run(write(tmp_path, *lines), tmp_path / "a", "--recipe", "sft")
    assert summary["after"]["by_task"] == {"number": 0.0, "unscored": None} and summary["after"]["accuracy"] == 0.0


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_file_only(tmp_path, no_picture):
    path, out = write(tmp_path, *(line(f"q{i}", answer=i) for i in range(6))), tmp_path / "a"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(path, out, "--recipe", "sd")
        (out / "summary.json").unlink()  # as if it had not finished
        manifest = (out / "manifest.json").read_text()
        write(tmp_path, *(line(f"q{i}", answer=i + 1) for i in range(6)))
        with pytest.raises(ValueError, match="mine.jsonl has changed since the run in .* began"):
            run(path, out, "--recipe", "sd", "--resume")
        assert (out / "manifest.json").read_text() == manifest
        write(tmp_path, *(line(f"q{i}", answer=i) for i in range(6)))
        assert run(path, out, "--recipe", "sd", "--resume")["steps"] == 1


def test_epochs_that_are_too_few_steps_for_the_ema_teacher_are_said(tmp_path, capsys):
    path = write(tmp_path, *(line(f"q{i}", answer=i) for i in range(10)))
    flags = ["--data", str(path), "--recipe", "ema", "--steps", "0", "--epochs", "2", "--batch", "4", "--dry-run"]
    with pytest.warns(UserWarning, match=r"never moves: --epochs 2 of 8 questions are 4 steps"):
        train.main(parse(flags))
    told = capsys.readouterr().out
    assert "10 number; 8 to train on, 2 held out" in told and "steps: 4," in told
    with pytest.raises(ValueError, match="no line can be used"):
        train.main(parse(["--data", str(write(tmp_path, "{")), "--dry-run"]))
