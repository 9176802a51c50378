"""mutants.py - do the tests bite? Small mistakes are put into the method, one at a time, and the quick tests must notice each.

    python -m experiments.mutants                    240 mistakes, drawn from all there are (Linux, macOS)
    python -m experiments.mutants --only losses      one file of them

A mistake ("mutant") is one change of the syntax tree: another operator, a constant off by one, a lost sign, a comparison that
includes its end, a dropped detach(), two arguments swapped. It is *killed* if a test fails with it, and it *survives* if none
does; then a test is missing, or the change changes nothing (x * 1.0, a larger chunk). It exists because a coverage figure says
what was run, and only this says what was looked at.

Depends on pytest; nothing is written to disk.   Try it:  python -m pytest tests/test_mutants.py -q
"""

import argparse
import ast
import copy
import io
import json
import os
import random
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from tqdm import tqdm

from engine.checkpoint import command

ROOT = Path(__file__).parents[1]
FILES = {name: ROOT / f"{name.replace('.', '/')}.py" for name in ("losses", "agreement", "ema", "unisd", "engine.head")}
TESTS = "losses agreement ema unisd golden by_hand adaptive train loading".split()  # the quick tests that use these files
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv}
SWAPS |= {ast.Pow: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq}
SWAPS |= {ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And, ast.BitOr: ast.BitAnd}
METHODS = {"sum": "mean", "mean": "sum", "amax": "amin", "amin": "amax", "min": "max", "max": "min", "exp": "log", "log": "exp"}
METHODS |= {"minimum": "maximum", "maximum": "minimum", "ceil": "floor", "zeros_like": "ones_like", "any": "all", "all": "any"}
AS_THEY_ARE = ("isinstance", "getattr", "hasattr", "zip", "opt", "dict", "min", "max")  # no swapped arguments: no mistake
DROPPED = ("detach", "clamp", "abs", "square", "clone", "float", "lerp_", "mul_", "neg", "log_softmax")  # x.detach() -> x


def changes(node: ast.AST) -> Iterator[Callable[[ast.AST], ast.AST]]:
    """All small mistakes at one node, each a function that makes it in a copy of that node."""

    def put(**fields):
        def change(copied):
            for name, value in fields.items():
                setattr(copied, name, value)
            return copied

        return change

    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        yield put(op=SWAPS[type(node.op)]())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub | ast.Div):
        yield put(left=node.right, right=node.left)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield put(ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield lambda copied: copied.operand
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield put(value=node.value + 1)
        if node.value not in (0, 1):
            yield put(value=node.value / 2 if isinstance(node.value, float) else node.value - 1)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield put(value=not node.value)
    if isinstance(node, ast.IfExp):
        yield put(body=node.orelse, orelse=node.body)
    if isinstance(node, ast.Slice) and isinstance(node.lower, ast.Name | ast.Attribute):
        yield put(lower=ast.BinOp(node.lower, ast.Add(), ast.Constant(1)))
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            yield put(func=ast.Attribute(node.func.value, METHODS[node.func.attr], ast.Load()))
        if isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED:
            yield lambda copied: copied.func.value
        swaps = len(node.args) > 1 and getattr(node.func, "id", "") not in AS_THEY_ARE
        if swaps and not isinstance(node.args[0], ast.Starred | ast.Constant):
            yield put(args=[node.args[1], node.args[0], *node.args[2:]])


def nodes(tree: ast.Module) -> list[ast.AST]:
    """The nodes of what is computed: not annotations, not help texts or messages, not the example that a file prints."""
    skipped = set()
    for node in ast.walk(tree):
        parts = [getattr(node, name, None) for name in ("annotation", "returns", "decorator_list")]
        parts += [node] if isinstance(node, ast.Raise | ast.JoinedStr) else []
        parts += [node] if isinstance(node, ast.FunctionDef) and node.name in ("example", "example_step", "__repr__") else []
        parts += [node] if isinstance(node, ast.If) and "__main__" in ast.dump(node.test) else []
        for part in parts:
            for whole in part if isinstance(part, list) else [part] if part else []:
                skipped |= {id(inner) for inner in ast.walk(whole)}
    return [node for node in ast.walk(tree) if id(node) not in skipped]


def mutants(only: list[str]) -> list[tuple[str, int, str, str]]:
    """(module, line, "before -> after", its whole changed source) of every mistake there is."""
    found = []
    show = lambda node: " ".join(ast.unparse(node).split())[:90]
    for name in only:
        tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
        for node in nodes(tree):
            for change in changes(node):
                replaced = ast.fix_missing_locations(change(copy.deepcopy(node)))
                source = ast.unparse(Replace(node, replaced).visit(copy.copy(tree)))
                found.append((name, node.lineno if hasattr(node, "lineno") else 0, f"{show(node)} -> {show(replaced)}", source))
                Replace(replaced, node).visit(tree)  # put back: visiting changes in place
    return found


class Replace(ast.NodeTransformer):
    """Puts `new` where `old` is."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else self.generic_visit(node)


def is_ours(module: types.ModuleType) -> bool:
    """Is it of this repository, and not installed in a folder of it?"""
    path = Path(getattr(module, "__file__", None) or "/")
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in {"engine", "tasks", "tests", path.name}


def killed(name: str, source: str, tests: list[str], seconds: int) -> bool:
    """Does a quick test fail, or not end, with this source as the module `name`?"""
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(seconds)  # an endless loop is noticed, too; 0: no limit
            os.setsid()
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1), os.dup2(sink, 2)
            for loaded in [key for key, module in sys.modules.items() if is_ours(module)]:
                del sys.modules[loaded]  # all of ours is read anew, so that everybody meets the change
            sys.modules[name] = types.ModuleType(name)  # ... which is there before anybody imports it
            exec(compile(source, name, "exec"), vars(sys.modules[name]))
            tests.sort(key=lambda test: name not in test)  # stable; its own tests notice most
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", *tests]))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


@command("mutants.py")
def main(argv: list[str] | None = None) -> int:
    """Put small mistakes into the method, one at a time, and run the quick tests on each. Survivors are printed."""
    parser = argparse.ArgumentParser(prog="mutants.py", description=main.__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=FILES, default=list(FILES), help="the files that mistakes are put into (default: all five)")
    add("--number", type=int, default=240, help="how many, drawn from all there are (default: %(default)s; 0 = all)")
    add("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    add("--json", default="", help="a file for the result ('' = none)")
    args = parser.parse_args(argv)
    if not hasattr(os, "fork"):
        parser.exit(2, "mutants.py: needs fork(), which this platform lacks: use Linux or macOS\n")
    os.chdir(ROOT)
    every = mutants(args.only)
    chosen = sorted(random.Random(args.seed).sample(every, min(args.number or len(every), len(every))))
    tests, survivors, begun = [f"tests/test_{name}.py" for name in TESTS], [], time.perf_counter()
    with redirect_stdout(io.StringIO()):  # what they import is loaded once, before the forks
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *tests])
    if killed("no such module", "", tests, 0):
        parser.exit(2, "mutants.py: the tests fail without any mistake: mend that first\n")
    limit = 60 + 3 * int(time.perf_counter() - begun)  # seconds, after which a run of the tests does not end any more
    for name, line, what, source in tqdm(chosen, desc="mutants", unit="mutant"):
        if not killed(name, source, tests, limit):
            survivors.append({"file": name, "line": line, "change": what})
            tqdm.write(f"survives: {name} line {line}: {what}")
    dead, seconds = len(chosen) - len(survivors), time.perf_counter() - begun
    print(f"{dead} of {len(chosen)} killed ({100 * dead / len(chosen):.1f} %), drawn from {len(every)}; {seconds:.0f} s")
    if args.json:
        found = {"seed": args.seed, "possible": len(every), "tried": len(chosen), "killed": dead, "survivors": survivors}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
