"""bfcl.py: the leaderboard's rule on invented records of its schema; where the package is installed, against its own checker."""

import importlib.util
import json
import random
import sys
import types
from pathlib import Path

import pytest

from tasks import bfcl, catalog
from tasks.bfcl import is_right, said_call, score

installed = importlib.util.find_spec("bfcl_eval")
real = pytest.mark.skipif(not installed, reason="bfcl-eval is not installed")


def function(name, required=(), **properties):
    kinds = {
        n: dict(zip(("type", "items"), (k.split("-")[0], {"type": k.split("-")[-1]}), strict=True)) for n, k in properties.items()
    }
    return {
        "name": name,
        "description": f"Does {name}.",
        "parameters": {"type": "dict", "properties": kinds, "required": [*required]},
    }


ORDER = function("shop.order", ["item", "count"], item="string", count="integer", price="float", tags="array-string", where="dict")
CANCEL = function("shop.cancel", ["item"], item="string")
TRUTH = {
    "item": ["Blue Lamp", "lamp"], "count": [2], "price": [9.5, ""], "tags": [["new", "Red"], ""],
    "where": [{"city": ["Oslo"], "zip": ["0150", ""]}, ""],
}  # fmt: skip


def records(n=24):
    rows, answers = [], []
    for i in range(n):
        name = f"lamp {i}"
        rows.append(
            {"id": f"r{i}", "question": [[{"role": "user", "content": f"Order {i + 1} of {name}."}]], "function": [ORDER, CANCEL]}
        )
        truth = [{"shop.order": TRUTH | {"item": [name], "count": [i + 1]}}]
        answers.append({"id": f"r{i}", "ground_truth": truth})
    return rows, answers


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "possible_answer").mkdir()
    for part in ("simple_python", "multiple", "live_simple"):
        rows, answers = records()
        rows = [r | {"question": [[{"role": "user", "content": f"{part}: {r['question'][0][0]['content']}"}]]} for r in rows]
        for name, lines in ((f"BFCL_v4_{part}.json", rows), (f"possible_answer/BFCL_v4_{part}.json", answers)):
            (tmp_path / name).write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return tmp_path


def example():
    (row, *_), (answer, *_) = records()
    return bfcl.to_example("multiple", row, [{"shop.order": TRUTH}])


@pytest.mark.parametrize(
    ("call", "right"),
    [
        ("shop.order(item='Blue Lamp', count=2)", True),
        ("shop.order(count=2, item='blue-lamp.')", True),  # case, spaces and some signs do not count
        ("shop.order(item='lamp', count=2, price=9.5)", True),
        ("shop.order(item='lamp', count=2, tags=['New', 'red'])", True),
        ("shop.order(item='lamp', count=2, where={'city': 'oslo'})", True),
        ("shop.order(item='lamp', count=2, where={'city': 'Oslo', 'zip': '0150'})", True),
        ("shop.order(item='lamp', count=2, where={'zip': '0150'})", False),  # the city is needed
        ("shop.order(item='lamp', count=2, where={'city': 'Oslo', 'land': 'no'})", False),
        ("shop.order(item='lamp', count=2, tags=['red', 'new'])", False),  # a list has an order
        ("shop.order(item='lamp', count=2.0)", False),  # an integer is documented
        ("shop.order(item='lamp', count=True)", False),
        ("shop.order(item='lamp', count='2')", False),
        ("shop.order(item='lamp')", False),
        ("shop.order(item='lamp', count=2, colour='blue')", False),
        ("shop.cancel(item='lamp', count=2)", False),
        ("order(item='lamp', count=2)", False),
    ],
)
def test_the_rule(call, right):
    (result,) = score([example()], [call])
    assert result["correct"] is right and not result["abstained"]
    assert result["name"] is call.startswith("shop.order")


def test_an_int_may_stand_for_a_float_and_a_value_for_a_variable():
    answer = {
        "name": "f",
        "allowed": {"x": [3.0], "y": ["n"]},
        "kinds": {"x": ("float", None), "y": ("integer", None)},
        "required": [],
    }
    assert is_right("f", {"x": 3, "y": "n"}, answer)  # y: where an integer is documented the answer names a variable
    assert not is_right("f", {"x": 3, "y": 5}, answer) and not is_right("f", {"x": "3", "y": "n"}, answer)


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("I would use:\n```python\nf.g(a=1, b='x (y)')\n```", ("f.g", {"a": 1, "b": "x (y)"})),
        ("f(a=1) or rather f(a=2).", ("f", {"a": 2})),
        ("[f(a=-1.5, b=[1, (2, 3)], c={'k': None})]", ("f", {"a": -1.5, "b": [1, (2, 3)], "c": {"k": None}})),
        ("f()", ("f", {})),
        ("f(1)", None),  # positional: it does not say which argument
        ("f(a=g(b=1))", ("g", {"b": 1})),
        ("f(a=open)", None),
        ("no call", None),
        ("", None),
        ("f(" * 3000, None),
        ("f(a='" + "(" * 500 + ")" * 500, None),
    ],
)
def test_what_a_text_says(text, call):
    assert said_call(text) == call


def test_a_task(folder):
    task, manifest = bfcl.load(folder=folder)
    again, _ = bfcl.load(folder=folder, seed=1)
    assert {e.question for e in task.test} == {e.question for e in again.test} and task.train != again.train
    assert not {e.question for e in task.train} & {e.question for e in task.test}
    assert len(task.train) + len(task.test) == 48 and len(task.ood) == 24 and {e.task for e in task.ood} == {"live_simple"}
    assert all(r["correct"] and r["strict"] for r in score(task.train, [e.reference for e in task.train]))
    wrong = score(task.train, [e.negative for e in task.train])
    assert manifest["negatives"]["found"] == len(task.train) and not any(r["correct"] or r["abstained"] for r in wrong)
    e = task.train[0]
    assert "- price (float, optional)" in e.question and "shop.cancel: Does" in e.question and "tags" not in e.reference
    few, _ = bfcl.load(folder=folder, train_size=5, test_size=3, negatives=False)
    assert (len(few.train), len(few.test), len(few.ood)) == (5, 3, 3) and not any(e.negative for e in few.train)
    assert not bfcl.load(folder=folder, train_size=None)[0].train


@real
def test_the_docs_say_how_many_requests_there_are():
    task, _ = bfcl.load(negatives=False)
    said = (Path(__file__).parents[1] / "docs/real-models.md").read_text(encoding="utf-8")
    assert f"{len(task.train)} requests of" in said and f"{len(task.test)} held out" in said


def test_without_the_package_it_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps -r requirements-real.txt"):
        catalog.load_task("bfcl")
    with pytest.raises(ValueError, match="No such file"):
        bfcl.load(folder=tmp_path)


def test_what_cannot_be_used_is_named():
    (row, *_), _ = records(1)
    for truth in ([], [{"shop.order": TRUTH}] * 2, [{"shop.sell": TRUTH}], [{"shop.order": TRUTH | {"count": ["two"]}}]):
        if truth == [{"shop.order": TRUTH | {"count": ["two"]}}]:
            assert bfcl.to_example("multiple", row, truth)  # the name of a variable
        else:
            with pytest.raises(bfcl.Skip):
                bfcl.to_example("multiple", row, truth)


@real
def test_the_rule_is_that_of_the_leaderboards_own_checker():
    """On every right call, and on thousands of calls with something changed."""
    config = types.ModuleType("model_config")  # the real one imports every vendor's client
    config.MODEL_CONFIG_MAPPING = {"m": types.SimpleNamespace(underscore_to_dot=False)}
    kept = dict(sys.modules)
    sys.modules["bfcl_eval.constants.model_config"] = config
    for language in ("java", "js"):
        stub = types.ModuleType(language)
        setattr(stub, f"{language}_type_converter", None)
        sys.modules[f"bfcl_eval.eval_checker.ast_eval.type_convertor.{language}_type_converter"] = stub
    try:
        from bfcl_eval.constants.enums import Language
        from bfcl_eval.eval_checker.ast_eval.ast_checker import simple_function_checker
    finally:
        for name in set(sys.modules) - set(kept):
            del sys.modules[name]
    rng, compared, right = random.Random(0), 0, 0
    values = [1, 2.5, True, "x", "", [], [1], ["a"], {}, {"a": 1}, None]
    folder = Path(installed.origin).parent / "data"
    for part in ("simple_python", "multiple", "live_simple"):
        rows = [json.loads(line) for line in (folder / f"BFCL_v4_{part}.json").read_text(encoding="utf-8").splitlines()]
        lines = (folder / f"possible_answer/BFCL_v4_{part}.json").read_text(encoding="utf-8").splitlines()
        truths = {row["id"]: row["ground_truth"] for row in map(json.loads, lines)}
        for row in rows:
            try:
                e = bfcl.to_example(part, row, truths[row["id"]])
            except bfcl.Skip:
                continue
            name, arguments = said_call(e.reference)
            documented = next(f for f in row["function"] if f["name"] == name)
            tried = [(name, arguments), ("other", arguments)]
            for key in e.answer["allowed"]:
                for value in [*rng.sample(values, 4), *(v for v in e.answer["allowed"][key] if v != "")]:
                    tried.append((name, arguments | {key: value}))
                tried.append((name, {k: v for k, v in arguments.items() if k != key}))
            for said, given in tried:
                try:
                    theirs = simple_function_checker(documented, {said: given}, truths[row["id"]][0], Language.PYTHON, "m")["valid"]
                except (TypeError, AttributeError, KeyError, IndexError):
                    continue  # it ends in an error of its own
                assert is_right(said, given, e.answer) == theirs, (row["id"], given, e.answer["allowed"], e.answer["kinds"])
                compared, right = compared + 1, right + theirs
    assert compared > 10_000 and 0.1 < right / compared < 0.9
