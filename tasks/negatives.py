"""negatives.py - wrong references by rule, each proven wrong by the scorer. What the contrastive loss pushes away from (eq. 4-5).

A negative is the reference with one thing changed, and what depends on it, so that nothing but the content differs:

    choice   another option; in the explanation the two options' texts and letters change places
    number   the final number a little off, wherever it stands
    text     the answer of another question
    tools    one argument with another value, or another tool
    code     one token changed (an operator, a constant, a comparison, min for max), or a step left out

A candidate counts only if the scorer reads an answer in it and calls it wrong; code must fail a test, not hang. Where the scorer
does not call the reference right, nothing can be proven: no negative. It exists because a "wrong" reference that is right by
accident, or that only looks different, teaches the student to avoid the right answer, or a format.

Depends on data.py, programs.py, said.py, scoring.py, sandbox.py.   Try it:  python -m pytest tests/test_benchmarks.py -q
"""

import ast
import io
import json
import random
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from tasks.data import Example
from tasks.programs import defines, find_code, parse_python
from tasks.said import LETTERS, NUMBER, as_number, plain
from tasks.sandbox import Limits
from tasks.scoring import given, react_calls, score_all

TRIES = 10  # candidates per example, one per round
QUICK = Limits(wall_seconds=3.0, cpu_seconds=3)  # a mutant that hangs is not used, so it need not be waited for
Pool = dict[tuple[str, str], list[str]]


def pool_of(examples: Sequence[Example]) -> Pool:
    """What others answer, to be wrong with: ("text", ""): short texts; ("tools", argument's name or ""): what tools are given."""
    pool = defaultdict(set)
    for answer in (example.answer for example in examples if example.answer):
        if answer["kind"] == "text":
            pool["text", ""].add(answer["value"])
        for name, value in (argument for call in answer.get("calls", ()) for argument in given(call["arguments"]).items()):
            if isinstance(value, str):
                pool["tools", name].add(value)
                pool["tools", ""].add(value)
    return {key: sorted(values) for key, values in pool.items()}


def add_negatives(examples: Sequence[Example], seed: int) -> tuple[list[Example], dict]:
    """The examples, in order, each with a proven negative, or with "" where none was found. Same seed, same negatives. A negative
    that an example brings is tried first, and kept unless the scorer calls it right. -> (examples, {"found", "missing",
    "reference_fails": no negative because the reference itself is not called right}).
    """
    proven, pool = score_all(examples, [example.reference for example in examples]), pool_of(examples)
    candidates = {}
    for i, example in enumerate(examples):
        if example.answer and proven[i]["correct"]:
            made = MAKE[example.answer["kind"]](example, random.Random(f"{seed}-{i}"), pool)
            candidates[i] = chain([example.negative] if example.negative else [], made)
    found = {i: e.negative for i, e in enumerate(examples) if not e.answer and e.negative}  # nothing can judge these
    spare: dict[int, str] = {}  # code that raises is wrong, but code that returns something wrong is the better lesson
    for _ in range(TRIES):
        texts = {i: text for i, queue in candidates.items() if i not in found and (text := next(queue, None)) is not None}
        results = score_all([examples[i] for i in texts], list(texts.values()), QUICK)
        for (i, text), result in zip(texts.items(), results, strict=True):
            given = text == examples[i].negative  # it came with the data
            reason = result.get("reason", "assertion")  # only code can also fail to come to its tests
            if result["correct"] or (result["abstained"] and not given):
                continue
            if given or reason.startswith("assertion"):
                found[i] = text
            elif reason.startswith("error"):
                spare.setdefault(i, text)
    found = spare | found
    fails = sum(bool(example.answer) and not result["correct"] for example, result in zip(examples, proven, strict=True))
    counts = {"found": len(found), "missing": len(examples) - len(found) - fails, "reference_fails": fails}
    return [replace(example, negative=found.get(i, "")) for i, example in enumerate(examples)], counts


def others_than(value: str, pool: Sequence[str], rng: random.Random) -> list[str]:
    """A few texts of the pool that say something else, at random."""
    return [text for text in rng.sample(pool, min(TRIES, len(pool))) if plain(text) != plain(value)]


def swapped(text: str, a: str, b: str) -> str:
    """The text with a and b in each other's place, wherever they stand as whole words."""
    either = "|".join(rf"(?<!\w){re.escape(x)}(?!\w)" for x in sorted((a, b), key=len, reverse=True))
    flags = re.I if min(len(a), len(b)) > 2 else 0  # not every "a" and "no"

    def other(match: re.Match) -> str:
        old, new = (a, b) if match[0].casefold() == a.casefold() else (b, a)
        return new[0].upper() + new[1:] if match[0][0].isupper() and not old[0].isupper() else new

    return re.sub(either, other, text, flags=flags)


# --- choice, number, text --------------------------------------------------------------------------------------------
_LETTER = re.compile(  # a letter named as an answer, as in "Ans. is 'b'" and "option B"
    r"(\b(?:ans(?:wer)?\b\.?|option|choice)[\s*_]{0,3}(?:is\b|:|=|-)?[\s*_\"'`(\[]{0,4})([A-Z])(?!\w|['’]\w)", re.I
)
SLIPS = (-11, -10, -9, -5, -3, -2, -1, 1, 2, 3, 5, 9, 10, 11)


def wrong_choices(example: Example, rng: random.Random, pool: Pool) -> Iterator[str]:
    """Another option, and an explanation that argues for it."""
    options, right = example.answer["options"], LETTERS.index(example.answer["letter"])
    body = example.reference.rsplit("Answer:", 1)[0]
    wrong = [i for i, option in enumerate(options) if option.casefold() != options[right].casefold()]
    for i in rng.sample(wrong, len(wrong)):
        letters = {LETTERS[right]: LETTERS[i], LETTERS[i]: LETTERS[right]}
        letters |= {old.lower(): new.lower() for old, new in letters.items()}
        # Letters first, and not again in the texts that are put in afterwards: one of them may be called "choice B".
        moved = _LETTER.sub(lambda match, letters=letters: match[1] + letters.get(match[2], match[2]), body)
        yield swapped(moved, options[right], options[i]) + f"Answer: {LETTERS[i]}"


def wrong_numbers(example: Example, rng: random.Random, pool: Pool) -> Iterator[str]:
    """A number of the same sign nearby, in place of the result wherever it stands."""
    value = as_number(example.answer["value"])

    def moved(match: re.Match, step: int) -> str:
        said = as_number(match[0])
        if said != value:
            return match[0]
        sign = re.match(r"[^\d.]*", match[0])[0]  # and the currency
        return sign + (f"{abs(said + step):,f}" if "," in match[0] else f"{abs(said + step):f}")

    for step in rng.sample(SLIPS, len(SLIPS)):
        if (value < 0) == (value + step < 0):
            yield re.sub(NUMBER, lambda match, step=step: moved(match, step), example.reference)


def wrong_texts(example: Example, rng: random.Random, pool: Pool) -> Iterator[str]:
    value, mark = example.answer["value"], example.answer["mark"]
    body = example.reference.rsplit(mark, 1)[0]
    for other in others_than(value, pool["text", ""], rng):
        yield f"{swapped(body, value, other)}{mark} {other}"


# --- tool calls ------------------------------------------------------------------------------------------------------
def wrong_calls(example: Example, rng: random.Random, pool: Pool) -> Iterator[str]:
    """One argument of one call with another value, or one call to another tool."""
    calls, text = react_calls(example.reference), example.reference
    wrong, called = [], {call["action"] for call in calls}
    for call in calls:
        for name, value in given(call["arguments"]).items():
            others = other_values(name, value, example, rng, pool)[:3]
            wrong += [with_argument(text, calls, call, name, other) for other in others]
        tools = [tool for tool in example.answer["actions"] if tool not in called]
        wrong += [re.sub(rf"(?<!\w){re.escape(call['action'])}(?!\w)", lambda _, tool=tool: tool, text) for tool in tools]
    yield from rng.sample(wrong, len(wrong))


def with_argument(text: str, calls: Sequence[dict], call: dict, name: str, new) -> str:
    """The text with another value for one argument of one call, also in the thought before it."""
    start, end, old = call["start"], call["end"], call["arguments"][name]
    since = max([0, *(other["end"] for other in calls if other["end"] <= start)])
    both_texts = isinstance(old, str) and isinstance(new, str)
    thought = swapped(text[since:start], old, new) if both_texts else text[since:start]
    pair = rf"({re.escape(json.dumps(name))}\s*:\s*){re.escape(json.dumps(old, ensure_ascii=False))}"
    put = lambda match: match[1] + json.dumps(new, ensure_ascii=False)
    return text[:since] + thought + re.sub(pair, put, text[start:end], count=1) + text[end:]


def other_values(name: str, value, example: Example, rng: random.Random, pool: Pool) -> list:
    """Plausible other values for an argument: from the tool's documentation, near it, or from other examples."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return rng.sample([value + 1, value + 2, value * 2 + 1], 3)
    if not isinstance(value, str):
        return [value[:-1]] if isinstance(value, list) and value else []
    listed = re.search(rf'"{re.escape(name)}": "[^"]*One of: \[([^\]]*)\]', example.question)
    documented = [option.strip() for option in listed[1].split(",")] if listed else []
    near = [re.sub(r"[0-9](?!.*[0-9])", lambda digit: str((int(digit[0]) + 1) % 10), value)]  # its last digit
    sources = (documented, near, pool["tools", name], pool["tools", ""])
    return next((others for source in sources if (others := others_than(value, source, rng))), [])


# --- code ------------------------------------------------------------------------------------------------------------
SWAPS = "< <=, > >=, == !=, + -, & |, << >>, += -=, and or, True False, min max, any all, upper lower, keys values, floor ceil"
SWAPS += ", lstrip rstrip, startswith endswith, nlargest nsmallest, union intersection"
OTHER = {old: new for pair in SWAPS.split(", ") for old, new in (pair.split(), pair.split()[::-1])}
OTHER |= {"*": "+", "//": "*", "/": "*", "%": "//", "**": "*", "^": "&", "*=": "+=", "not": "", "in": "not in", "sum": "max"}
OTHER |= {"append": "extend", "sorted": "list", "reversed": "list", "abs": "int"}  # a token -> what a slip makes of it


def wrong_programs(example: Example, rng: random.Random, pool: Pool) -> Iterator[str]:
    parts, entry = find_code(example.reference, example.answer["entry"])[0], example.answer["entry"]
    code = next((part for part in reversed(parts) if defines(part, entry)), "")
    for mutant in mutants(code, rng):
        if defines(mutant, entry):
            yield example.reference.replace(code, mutant, 1)


def mutants(code: str, rng: random.Random) -> Iterator[str]:
    """Programs that differ from this one in one place and are still Python, likely slips first. The layout stays."""
    likely, unlikely = slips(code)
    for row, start, end, new in rng.sample(likely, len(likely)) + rng.sample(unlikely, len(unlikely)):
        lines = code.split("\n")  # not splitlines(): a form feed ends no line of Python
        lines[row - 1] = lines[row - 1][:start] + new + lines[row - 1][end:]
        mutant = "\n".join(lines)
        if parse_python(mutant):
            yield mutant


def slips(code: str) -> tuple[list[tuple], list[tuple]]:
    """(likely, unlikely) edits (row, start, end, new text) of one token or statement."""
    likely, unlikely, before = [], [], tokenize.NEWLINE
    tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    strings = list(dict.fromkeys(token.string for token in tokens if token.type == tokenize.STRING))
    for token in tokens:
        kind, text, (row, start), (last_row, end), _ = token
        if kind in (tokenize.OP, tokenize.NAME) and text in OTHER:
            likely.append((row, start, end, OTHER[text]))
        elif kind == tokenize.NUMBER and re.fullmatch(r"\d{1,15}(\.\d+)?", text):
            near = [f"{float(text) + step:g}" if "." in text else str(int(text) + step) for step in (1, -1)]
            likely += [(row, start, end, number) for number in near]
        elif kind == tokenize.STRING and row == last_row and before in (tokenize.OP, tokenize.NAME):  # no docstring
            likely += [(row, start, end, string) for string in strings if string != text][:2]
            unlikely.append((row, start, end, text.swapcase()))
        if kind not in (tokenize.NL, tokenize.COMMENT):
            before = kind
    for node in ast.walk(parse_python(code)):
        if not isinstance(node, ast.Expr | ast.Return) or not node.value or node.lineno != node.end_lineno:
            continue
        line = code.split("\n")[node.lineno - 1].encode()  # ast counts bytes, tokenize characters
        start, end = (len(line[:column].decode()) for column in (node.col_offset, node.end_col_offset))
        if isinstance(node, ast.Return):
            unlikely.append((node.lineno, end, end, " - 1"))
        elif isinstance(node.value, ast.Call):
            likely.append((node.lineno, start, end, "pass"))  # a step is forgotten: arr.sort()
    return likely, unlikely


MAKE = dict(choice=wrong_choices, number=wrong_numbers, text=wrong_texts, tools=wrong_calls, code=wrong_programs)
