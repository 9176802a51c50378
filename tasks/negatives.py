"""negatives.py - wrong references by rule, each proven wrong by the scorer. What the contrastive loss pushes away from (eq. 4-5).

What: a negative is the reference with one thing changed, and what depends on it, so that nothing but the content differs:

    choice   another option; in the explanation the two options' texts and letters change places
    number   the final number a little off, wherever it stands
    text     the answer of another question
    tools    one argument with another value, or another tool
    code     one token changed (an operator, a constant, a comparison, min for max), or a step left out

A candidate counts only if the scorer reads an answer in it and calls it wrong; code must fail a test, not hang. Where the
scorer does not call the reference right, nothing can be proven: no negative. All code of a round runs in one sandbox call.

Not like the official code, where a quarter of the model-written negatives become right answers when the seed changes, all stand
in another template than the positive, and failed generations are used as they are.

Depends on data.py, scoring.py, sandbox.py.   Try it:  python -m pytest tests/test_benchmarks.py -q
"""

import ast
import io
import json
import random
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tasks.data import Example
from tasks.sandbox import Limits
from tasks.scoring import LETTERS, NUMBER, as_number, defined, find_code, given, parse_python, plain, react_calls, score_all

TRIES = 10  # candidates per example, one per round
QUICK = Limits(wall_seconds=3.0, cpu_seconds=3)  # a mutant that hangs is not used, so it need not be waited for


@dataclass(frozen=True)
class Pool:
    """What other examples answer, to be wrong with: texts, and the text arguments of tools by name ("" = of any name)."""

    texts: list[str]
    arguments: dict[str, list[str]]

    @staticmethod
    def of(examples: Sequence[Example]) -> "Pool":
        answers = [e.answer for e in examples if e.answer]
        arguments = defaultdict(set)
        for call in (call for a in answers if a["kind"] == "tools" for call in a["calls"]):
            for name, value in given(call["arguments"]).items():
                if isinstance(value, str):
                    arguments[name].add(value)
                    arguments[""].add(value)
        texts = {a["value"] for a in answers if a["kind"] == "text"}
        return Pool(sorted(texts), {name: sorted(values) for name, values in arguments.items()})


def add_negatives(examples: Sequence[Example], seed: int) -> tuple[list[Example], dict]:
    """The examples, in order, each with a proven negative, or with "" where none was found. Same seed, same negatives.

    A negative that an example brings is tried first, and kept unless the scorer calls it right. -> (examples, {"found",
    "missing", "reference_fails": no negative because the reference itself is not called right}).
    """
    proven, pool = score_all(examples, [e.reference for e in examples]), Pool.of(examples)
    queues = {
        i: _candidates(e, random.Random(f"{seed}-{i}"), pool) for i, e in enumerate(examples) if e.answer and proven[i]["correct"]
    }
    found = {i: e.negative for i, e in enumerate(examples) if not e.answer and e.negative}  # nothing can judge these
    spare: dict[int, str] = {}  # code that raises is wrong, but code that returns something wrong is the better lesson
    for _ in range(TRIES):
        texts = {i: next(queue, None) for i, queue in queues.items() if i not in found}
        texts = {i: text for i, text in texts.items() if text is not None}
        results = score_all([examples[i] for i in texts], list(texts.values()), QUICK)
        for (i, text), result in zip(texts.items(), results, strict=True):
            reason = result.get("reason", "assertion")  # only code can also fail to come to its tests
            if text == examples[i].negative and not result["correct"]:
                found[i] = text
            elif not result["correct"] and not result["abstained"] and reason.startswith(("assertion", "error")):
                (found if reason.startswith("assertion") else spare).setdefault(i, text)
    found = spare | found
    fails = sum(bool(e.answer) and not p["correct"] for e, p in zip(examples, proven, strict=True))
    counts = {"found": len(found), "missing": len(examples) - len(found) - fails, "reference_fails": fails}
    return [replace(e, negative=found.get(i, "")) for i, e in enumerate(examples)], counts


def _candidates(e: Example, r: random.Random, pool: Pool) -> Iterator[str]:
    if e.negative:
        yield e.negative
    yield from MAKE[e.answer["kind"]](e, r, pool)


def _some(pool: Sequence[str], but: str, r: random.Random) -> list[str]:
    """A few of the pool that are not `but`, at random."""
    return [x for x in r.sample(pool, min(TRIES, len(pool))) if plain(x) != plain(but)]


def swapped(text: str, a: str, b: str) -> str:
    """The text with a and b in each other's place, wherever they stand as whole words."""
    either = "|".join(rf"(?<!\w){re.escape(x)}(?!\w)" for x in sorted((a, b), key=len, reverse=True))
    flags = re.IGNORECASE if min(len(a), len(b)) > 2 else 0  # not every "a" and "no"

    def other(m: re.Match) -> str:
        old, new = (a, b) if m[0].casefold() == a.casefold() else (b, a)
        return new[0].upper() + new[1:] if m[0][0].isupper() and not old[0].isupper() else new

    return re.sub(either, other, text, flags=flags)


# --- choice, number, text --------------------------------------------------------------------------------------------

_LETTER = re.compile(  # a letter named as an answer, as in "Ans. is 'b'" and "option B"
    r"(\b(?:ans(?:wer)?\b\.?|option|choice)[\s*_]{0,3}(?:is\b|:|=|-)?[\s*_\"'`(\[]{0,4})([A-Z])(?!\w|['’]\w)", re.I
)
SLIPS = (-11, -10, -9, -5, -3, -2, -1, 1, 2, 3, 5, 9, 10, 11)


def _choice(e: Example, r: random.Random, pool: Pool) -> Iterator[str]:
    options, right = e.answer["options"], LETTERS.index(e.answer["letter"])
    body = e.reference.rsplit("Answer:", 1)[0]
    others = [i for i, text in enumerate(options) if text.casefold() != options[right].casefold()]
    for i in r.sample(others, len(others)):
        letters = {LETTERS[right]: LETTERS[i], LETTERS[i]: LETTERS[right]}
        letters |= {old.lower(): new.lower() for old, new in letters.items()}
        # Letters first, and not again in the texts that are put in afterwards: one of them may be called "choice B".
        moved = _LETTER.sub(lambda m, letters=letters: m[1] + letters.get(m[2], m[2]), body)
        yield swapped(moved, options[right], options[i]) + f"Answer: {LETTERS[i]}"


def _number(e: Example, r: random.Random, pool: Pool) -> Iterator[str]:
    value = as_number(e.answer["value"])

    def moved(m: re.Match, step: int) -> str:
        said = as_number(m[0])
        if said != value:
            return m[0]
        sign = re.sub(r"[\d,.]", "", m[0])  # and the currency
        return sign + (f"{abs(said + step):,f}" if "," in m[0] else f"{abs(said + step):f}")

    for step in r.sample(SLIPS, len(SLIPS)):
        if (value < 0) == (value + step < 0):
            yield re.sub(NUMBER, lambda m, step=step: moved(m, step), e.reference)


def _text(e: Example, r: random.Random, pool: Pool) -> Iterator[str]:
    value, mark = e.answer["value"], e.answer["mark"]
    body = e.reference.rsplit(mark, 1)[0]
    for other in _some(pool.texts, value, r):
        yield f"{swapped(body, value, other)}{mark} {other}"


# --- tool calls ------------------------------------------------------------------------------------------------------


def _tools(e: Example, r: random.Random, pool: Pool) -> Iterator[str]:
    calls, text = react_calls(e.reference), e.reference
    changes, names = [], {call["action"] for call in calls}
    for call in calls:
        for key, value in given(call["arguments"]).items():
            changes += [(call, key, other) for other in _other_values(key, value, e, r, pool)[:3]]
        changes += [(call, None, name) for name in e.answer["actions"] if name not in names]
    for call, key, new in r.sample(changes, len(changes)):
        if key is None:
            yield re.sub(rf"(?<!\w){re.escape(call['action'])}(?!\w)", lambda _, new=new: new, text)
            continue
        start, end, old = call["start"], call["end"], call["arguments"][key]
        pair = rf"({re.escape(json.dumps(key))}\s*:\s*){re.escape(json.dumps(old, ensure_ascii=False))}"
        put = lambda m, new=new: m[1] + json.dumps(new, ensure_ascii=False)
        since = max([0, *(c["end"] for c in calls if c["end"] <= start)])  # the thought before this call says so too
        thought = swapped(text[since:start], old, new) if isinstance(old, str) and isinstance(new, str) else text[since:start]
        yield text[:since] + thought + re.sub(pair, put, text[start:end], count=1) + text[end:]


def _other_values(key: str, value, e: Example, r: random.Random, pool: Pool) -> list:
    """Plausible other values for an argument: from the tool's documentation, near it, or from other examples."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return r.sample([value + 1, value + 2, value * 2 + 1], 3)
    if not isinstance(value, str):
        return [value[:-1]] if isinstance(value, list) and value else []
    listed = re.search(rf'"{re.escape(key)}": "[^"]*One of: \[([^\]]*)\]', e.question)
    documented = [x.strip() for x in listed[1].split(",")] if listed else []
    near = [re.sub(r"[0-9](?!.*[0-9])", lambda m: str((int(m[0]) + 1) % 10), value)]  # its last digit
    sources = (documented, near, pool.arguments[key], pool.arguments[""])
    return next((others for source in sources if (others := _some(source, value, r))), [])


# --- code ------------------------------------------------------------------------------------------------------------

OTHER = {  # a token -> what a slip makes of it
    **{"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+", "//": "*"},
    **{"/": "*", "%": "//", "**": "*", "&": "|", "|": "&", "^": "&", "<<": ">>", ">>": "<<", "+=": "-=", "-=": "+="},
    **{"*=": "+=", "and": "or", "or": "and", "not": "", "in": "not in", "True": "False", "False": "True", "min": "max"},
    **{"max": "min", "any": "all", "all": "any", "sum": "max", "upper": "lower", "lower": "upper", "append": "extend"},
    **{"nlargest": "nsmallest", "nsmallest": "nlargest", "startswith": "endswith", "endswith": "startswith"},
    **{"lstrip": "rstrip", "rstrip": "lstrip", "floor": "ceil", "ceil": "floor", "keys": "values", "values": "keys"},
    **{"union": "intersection", "intersection": "union", "sorted": "list", "reversed": "list", "abs": "int"},
}


def _code(e: Example, r: random.Random, pool: Pool) -> Iterator[str]:
    code, _ = find_code(e.reference, e.answer["entry"])
    for mutant in mutants(code, r):
        if e.answer["entry"] in defined(parse_python(mutant)):
            yield e.reference.replace(code, mutant, 1)


def mutants(code: str, r: random.Random) -> Iterator[str]:
    """Programs that differ from this one in one place and are still Python, likely slips first. The layout stays."""
    likely, unlikely = _slips(code)
    for row, start, end, new in r.sample(likely, len(likely)) + r.sample(unlikely, len(unlikely)):
        lines = code.split("\n")  # not splitlines(): a form feed ends no line of Python
        lines[row - 1] = lines[row - 1][:start] + new + lines[row - 1][end:]
        mutant = "\n".join(lines)
        if parse_python(mutant):
            yield mutant


def _slips(code: str) -> tuple[list[tuple], list[tuple]]:
    """(likely, unlikely) edits (row, start, end, new text) of one token or statement."""
    likely, unlikely, before = [], [], tokenize.NEWLINE
    tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    strings = list(dict.fromkeys(t.string for t in tokens if t.type == tokenize.STRING))
    for t in tokens:
        spot = (t.start[0], t.start[1], t.end[1])
        if t.type in (tokenize.OP, tokenize.NAME) and t.string in OTHER:
            likely.append((*spot, OTHER[t.string]))
        elif t.type == tokenize.NUMBER and re.fullmatch(r"\d{1,15}(\.\d+)?", t.string):
            step = (lambda d, n=t.string: f"{float(n) + d:g}") if "." in t.string else lambda d, n=t.string: str(int(n) + d)
            likely += [(*spot, step(1)), (*spot, step(-1))]
        elif t.type == tokenize.STRING and t.start[0] == t.end[0] and before in (tokenize.OP, tokenize.NAME):  # no docstring
            likely += [(*spot, s) for s in strings if s != t.string][:2]
            unlikely.append((*spot, t.string.swapcase()))
        if t.type not in (tokenize.NL, tokenize.COMMENT):
            before = t.type
    for node in ast.walk(parse_python(code)):
        if not isinstance(node, ast.Expr | ast.Return) or not node.value or node.lineno != node.end_lineno:
            continue
        line = code.split("\n")[node.lineno - 1].encode()  # ast counts bytes, tokenize characters
        start, end = (len(line[:at].decode()) for at in (node.col_offset, node.end_col_offset))
        if isinstance(node, ast.Return):
            unlikely.append((node.lineno, end, end, " - 1"))
        elif isinstance(node.value, ast.Call):
            likely.append((node.lineno, start, end, "pass"))  # a step is forgotten: arr.sort()
    return likely, unlikely


MAKE = {"choice": _choice, "number": _number, "text": _text, "tools": _tools, "code": _code}
