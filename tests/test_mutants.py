"""Mistakes that are put into the method: each is one change, the rest of the file stays, and the tests that must notice it do."""

import ast
import os

import pytest

from experiments import mutants

DIVIDED = "def f(x, y):\n    return (x - y).detach().clamp(min=0.5) / 2\n"


def test_every_kind_of_mistake_is_one_change(tmp_path, monkeypatch):
    (tmp_path / "m.py").write_text(DIVIDED)
    monkeypatch.setattr(mutants, "FILES", {"m": tmp_path / "m.py"})
    found = {change: source for _, _, change, source in mutants.mutants(["m"])}
    assert "x - y -> x + y" in found and "x - y -> y - x" in found and "(x - y).detach() -> x - y" in found
    assert "0.5 -> 0.25" in found and "2 -> 3" in found and any(change.endswith("-> x - y") for change in found)
    assert len({*found.values()}) == len(found) and ast.unparse(ast.parse(DIVIDED)) not in found.values()


@pytest.mark.slow
def test_the_method_has_hundreds_and_none_in_what_is_only_said():
    every = mutants.mutants(list(mutants.FILES))
    assert len(every) > 400 and {name for name, *_ in every} == set(mutants.FILES)
    lines = {name: path.read_text(encoding="utf-8").split("\n") for name, path in mutants.FILES.items()}
    assert not [
        line for name, line, *_ in every if "raise ValueError" in lines[name][line - 1] or "print(" in lines[name][line - 1]
    ]
    for _, _, _, source in every[::25]:
        compile(source, "mutant", "exec")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_mistake_is_killed_and_none_is_not():
    tests = ["tests/test_agreement.py"]
    right = mutants.FILES["agreement"].read_text(encoding="utf-8")
    assert not mutants.killed("agreement", right, tests, 0)
    assert mutants.killed("agreement", right.replace("logps.amax(0) - logps.amin(0)", "logps.amax(0) + logps.amin(0)"), tests, 0)
