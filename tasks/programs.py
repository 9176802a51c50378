"""programs.py - where in an answer is the program?

A model writes its program between marks of a code fence, or without; closed on the last line of code or never; helpers in a fence
of their own, marks inside of strings. So no pattern decides where a program begins and ends, but Python's parser: among the spans
between marks, what counts is one that is Python and binds the name that is asked for. It exists because an answer must neither
lose nor win by how it is wrapped.

Depends on nothing of ours.   Try it:  python -m pytest tests/test_benchmarks.py -q -k code
"""

import ast
import re
import symtable
import textwrap
import warnings
from collections import namedtuple

MARK = re.compile(r"(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+-]*)[ \t]*")
MANY = 40  # marks or lines of a text that are looked at: a broken model writes thousands
Fence = namedtuple("Fence", "closed python neat code")  # neat: between marks of backticks, each at the start of its line
SCOPES = ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp  # what is bound in them stays in them


def parse_python(source: str) -> ast.Module | None:
    """The syntax tree, or None if this is no Python: to the parser, or to the compiler ("return" outside function)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in a string is only worth a SyntaxWarning
        try:
            compile(source, "", "exec", dont_inherit=True)
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last three: null bytes, absurd nesting
            return None


def defined(tree: ast.Module) -> dict[str, ast.AST]:
    """The names that a module binds, also by import and below if, try, for ..., each with its node. The last one counts."""
    names, todo = {}, tree.body[::-1]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0]: node for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = node
        elif not isinstance(node, SCOPES):
            todo += [*ast.iter_child_nodes(node)][::-1]
    return names


def defines(code: str, entry: str) -> bool:
    """Is this Python that binds the name? For "": Python that says anything?"""
    tree = parse_python(code)
    return bool(tree and tree.body) and (not entry or entry in defined(tree))


def fences(text: str, entry: str = "") -> list[Fence]:
    """The code fences of a text, in order; instead of a fence of Markdown, those in it. A text that is all Python has none.

    A fence ends at the last mark up to which its code binds `entry`, else up to which it is Python at all, else at the first
    closing mark: what a string or a comment holds does not end it.
    """
    marks, found, at = [*MARK.finditer(text)], [], 0
    if not marks or parse_python(text.replace("~~~", "```")):  # ~~~x would be Python
        return []
    where, marks = [*(mark.start() for mark in marks), len(text)][: MANY + 1], marks[:MANY]
    leads = [not text[:start].rpartition("\n")[2].strip() for start in where]
    opens = [bool(mark["language"]) and first for mark, first in zip(marks, leads, strict=False)] + [False]
    while at < len(marks):
        mark, starts = marks[at], [text.find("\n", marks[at].end()) + 1 or len(text)]
        if text[mark.end() : starts[0]].strip():  # code in the line of its mark?
            starts += [mark.end(), mark.end("mark")]
        ends = [i for i in range(at + 1, len(marks)) if marks[i]["mark"].startswith(mark["mark"])] + [len(marks)]
        # A fence in a list is indented. Others are left alone: dedent() changes lines of blanks also where a string holds them.
        undented = lambda code: textwrap.dedent(code) if code.lstrip("\r\n")[:1].isspace() else code
        spans = [(i, undented(text[start : where[i]])) for start in starts for i in ends[::-1] if start < where[i]]
        span = next((span for name in (entry, "") for span in spans if defines(span[1], name)), None)
        closing = next(i for i in ends if i == len(marks) or leads[i] > opens[i])
        end, code = span or (closing, text[starts[0] : where[closing]])
        python, closed = mark["language"].lower() in ("python", "py", "python3"), end < len(marks)
        neat = closed and leads[at] and leads[end] and mark["mark"][0] == "`"
        found += (not span and fences(code, entry)) or [Fence(closed, python, neat, code)]
        at = end + (not opens[end])  # the mark that opens the next fence may be what ends this one
    return found


def find_code(text: str, entry: str) -> tuple[list[str], bool]:
    """(the parts of a completion's program, is it one neat python fence?). No parts if nothing binds `entry`.

    The last closed python fence that binds `entry`, else the last other fence that does, with the fences that bind what it lacks.
    Without closed fences: the text, or the most of its lines that is Python. Broken code of `entry` is returned: it was tried.
    """
    found = fences(text, entry) if entry in text else []
    order = sorted(range(len(found)), key=lambda i: (*found[i][:2], i), reverse=True)
    strict = len(found) == 1 and found[0].python and found[0].neat
    right = next((i for i in order if defines(found[i].code, entry)), None)
    if right is not None:
        return _with_helpers([fence.code for fence in found], right, entry), strict
    spans = []
    if entry in text and not any(fence.closed for fence in found):  # prose may stand before and after
        edges = [*(match.start() for match in re.finditer(r"^(?=\S)", text, re.MULTILINE)), len(text)][: MANY + 1]
        spans = [text, *sorted((text[a:b] for i, a in enumerate(edges) for b in edges[i + 1 :]), key=len, reverse=True)]
    tried = [found[i].code for i in order] + [text]
    broken = (code for code in tried if re.search(rf"\b(?:def|class)\s+{re.escape(entry)}\b", code))
    whole = next((span for span in spans if defines(span, entry)), None) or next(broken, None)
    return [whole] * (whole is not None), strict


def _with_helpers(codes: list[str], right: int, entry: str) -> list[str]:
    """codes[right]; if it uses names that it does not bind and the others do, with the others, in their order."""
    bound = [defined(parse_python(code)) if defines(code, "") else {} for code in codes]
    lacking = _globals(symtable.symtable(codes[right], "", "exec")) - bound[right].keys() | {"*"}
    others = [i for i, names in enumerate(bound) if names and i != right and not (i > right and entry in names)]
    needed = any(lacking & bound[i].keys() for i in others)
    return [codes[i] for i in sorted([right, *others] if needed else [right])]


def _globals(table: symtable.SymbolTable) -> set[str]:
    """The names that a program looks up outside of its functions."""
    return {x.get_name() for x in table.get_symbols() if x.is_global()}.union(*map(_globals, table.get_children()))
