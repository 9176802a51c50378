"""scoring.py - was it answered? How a completion is judged, for every kind of answer but the tiny world's.

`Example.answer` says what is compared, as plain data; its "kind" says how:

    choice   {"letter": "B", "options": [...]}                the last answer stated, by its letter
    number   {"value": "72", "mark": "####"}                  the number after the mark, as a decimal
    text     {"value": "Paris", "mark": "Answer:"}            exact, except for case, spaces and punctuation
    tools    {"calls": [{"action": ..., "arguments": {}}]}    all calls, in order, by parsed JSON values
    code     {"entry": "f", "tests": [...], "prelude": ""}    the tests, run in sandbox.py
    None     nothing to compare with: never correct, always abstained

Every result has correct (a lenient reading: the answer counts, not its form), abstained (no answer was found) and strict
(correct, and in the very format that the question asks for), then what its kind adds. It exists because an accuracy is worth no
more than the reading of the answers: a model must gain neither by being vague nor by the mere form of an answer.

Depends on data.py, programs.py, sandbox.py.   Try it:  python -m pytest tests/test_benchmarks.py -q
"""

import ast
import contextlib
import json
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from tasks.data import Example
from tasks.programs import find_code, parse_python
from tasks.sandbox import Limits, run_tests


def score_all(examples: Sequence[Example], completions: Sequence[str], limits: Limits | None = None) -> list[dict]:
    """A result for each completion, in order (see the top of the file); all code runs in one sandbox call.

    Raises ValueError if an answer is of no known kind, or if there are not as many completions as examples.
    """
    results, jobs = [], []
    for example, text in zip(examples, completions, strict=True):
        answer = {"kind": "none"} if example.answer is None else example.answer
        if not isinstance(answer, dict) or answer.get("kind") not in JUDGES:
            raise ValueError(f"task {example.task!r} has an answer of another kind than {', '.join(JUDGES)}: {answer!r}")
        result = JUDGES[answer["kind"]](answer, text)
        if "program" in result:
            jobs.append((result, (result.pop("program"), answer["tests"], answer["entry"])))
        results.append(result)
    verdicts = run_tests([job for _, job in jobs], limits or Limits()) if jobs else []
    for (result, _), verdict in zip(jobs, verdicts, strict=True):
        result.update(correct=verdict.passed, strict=result["strict"] and verdict.passed, reason=verdict.reason)
    for result in results:
        result.setdefault("lenient", result["correct"])  # tools have their own: extra arguments are free
    return results


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return text.strip().rsplit("\n", 1)[-1].strip()


def _result(said: Any, correct: bool, in_format: bool) -> dict:
    return {"correct": correct, "abstained": said is None, "strict": correct and in_format}


# --- multiple choice -------------------------------------------------------------------------------------------------
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# All repeats are bounded: a model may write ten thousand spaces.
_OPENING = r"[\s*_\"'`(\[<{$]{0,9}"
_IS = r"[*_\"'`]{0,3}\s{0,3}(?:is\b|:|=|would\s+be\b|must\s+be\b)[\s:*_]{0,6}(?:(?:option|choice|letter)\b)?"
_BEFORE = (  # what makes the letter after it an answer
    rf"\banswer\b{_IS}",
    rf"\b(?:correct|right|best)\s+(?:option|choice|letter)\b{_IS}",
    r"\b(?:choose|pick|select)\s+(?:(?:option|choice|letter)\s)?",
    r"\\boxed\s?\{(?:\\text\w{0,5}\s?\{)?",
)
_STATED = re.compile(rf"(?:{'|'.join(_BEFORE)}){_OPENING}(?P<x>[A-Z])(?!\w|['’-]\w)", re.I)
_CALLED_RIGHT = re.compile(
    r"(?:\b(?:option|choice|answer)\s\(?|\()(?P<x>[A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b", re.I
)
_ALONE = re.compile(r"[\s*_\"'`(\[$]*(?P<x>[A-Z])[\s*_\"'`)\].:$]*", re.I)
_WITH_TEXT = re.compile(r"[*_(]*(?P<x>[A-Z])[).:*_]+\s+(?P<text>.+)", re.I)
_SECOND = re.compile(
    r"[\s()\]*_.\"']{0,6}?(?:,|/|&|\bor\b|\band\b|\s)(?:\s{0,3}(?:or|and)\b)?[\s(\[*_\"']{0,6}(?P<x>[A-Z])\b(?!['’-]\w)"
    r"(?:\s{0,3}(?:,|/|&|and\b|or\b)[\s(]{0,3}[A-Z]\b\)?){0,9}"
)
_REASONS = "because since as due is for given".split()


def said_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter stated last, or None if none is, or if the last statement names two."""
    letters = LETTERS[: len(options)]
    found: list[tuple[int, str | None]] = []  # (where it stands, the letter)
    for match in (match for pattern in (_STATED, _CALLED_RIGHT) for match in pattern.finditer(text)):
        letter, rest = match["x"].upper(), text[match.end("x") :].split("\n", 1)[0]
        if letter in letters and not _is_word(match["x"], rest, options[letters.index(letter)]):
            found.append((match.start("x"), None if _names_two(rest, letters) else letter))
    line = last_line(text)
    match = _ALONE.fullmatch(line) or _WITH_TEXT.fullmatch(line)
    if match and (letter := match["x"].upper()) in letters:
        option = options[letters.index(letter)]
        if plain(match.groupdict().get("text", option)) == plain(option):
            found.append((len(text), letter))
    return max(found, key=lambda statement: statement[0])[1] if found else None


def _is_word(letter: str, rest: str, option: str) -> bool:
    """Is this "a" (or "I") the English word? "The answer is a mammal" states no letter, "Answer: A because" does."""
    after = re.match(r"\s+(\w+)", rest)
    if letter not in "aAiI" or not after or plain(rest).startswith(plain(option)):
        return False
    return after[1] not in _REASONS and not re.match(r"(?:or|and|[A-Z])$", after[1])


def _names_two(rest: str, letters: str) -> bool:
    """Does what follows a letter add another one ("A or B", "A, B")? Not so in "B, C is wrong" and "B. A is wrong"."""
    match = _SECOND.match(rest)
    if not match or match["x"] not in letters:
        return False
    return bool(re.search(r"\bor\b", rest[: match.start("x")])) or not re.match(r"\s+\w", rest[match.end() :])


def _judge_choice(answer: dict, text: str) -> dict:
    said = said_letter(text, answer["options"])
    return _result(said, said == answer["letter"], last_line(text) == f"Answer: {answer['letter']}") | {"said": said}


# --- numbers and short texts -----------------------------------------------------------------------------------------
# Thousands' commas, decimals, a sign, a currency. Not a part of a word or of a fraction (3/4 is neither 3 nor 4).
NUMBER = (
    r"(?<![\w/])(?<!\d\.)(?<!/\s)(?:-?[$€£]\s?|[$€£]-|-)?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?!\d|\.\d|\s?/\s?\d)"
)
_ANSWER_IS = re.compile(r"\banswer\b[*_\"'`]{0,3}\s{0,3}(?:is\b|:|=)[ \t:*_]{0,6}|\\boxed\s?\{", re.I)


def as_number(text: str) -> Decimal | None:
    """The value of a text that is one number and nothing else ("$1,200.50", "-3", "25%"), or None."""
    text = text.strip().replace("−", "-")
    return _decimal(text) if re.fullmatch(rf"{NUMBER}\s?%?", text) else None


def _decimal(text: str) -> Decimal:
    return Decimal(re.sub(r"[^\d.-]", "", text))


def said_number(text: str) -> Decimal | None:
    """The number after the last ####, else after the last "answer is", else the last number; None if there is none."""
    text = text.replace("−", "-")
    marked, stated = text.split("####")[1:], _ANSWER_IS.split(text)[1:]
    lines = [part.strip().split("\n")[0] for part in marked[-1:]] + [part.split("\n")[0] for part in stated[-1:]]
    numbers = [found[0] for line in lines if (found := re.search(NUMBER, line))] + re.findall(NUMBER, text)[-1:]
    return _decimal(numbers[0]) if numbers else None


def _judge_number(answer: dict, text: str) -> dict:
    said, value = said_number(text), as_number(answer["value"])
    form = rf"{re.escape(answer['mark'])}\s?(?:{NUMBER})%?\.?"
    return _result(said, said is not None and said == value, bool(re.fullmatch(form, last_line(text).replace("−", "-"))))


def plain(text: str) -> str:
    """A text without the differences that do not count: case, spaces, punctuation."""
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(c).startswith("P") else c for c in text)
    return " ".join(kept.split()) or " ".join(text.split())  # an answer may be nothing but punctuation


def _judge_text(answer: dict, text: str) -> dict:
    """What follows the last "answer is" or "Answer:" counts, else the last line."""
    stated = _ANSWER_IS.split(text)[1:]
    said = stated[-1].strip().split("\n")[0].strip() if stated else last_line(text)
    said = re.sub(r"^<(.*)>\.?$", r"\1", said) or None  # in the dress of a placeholder: Answer: <Paris>
    correct = said is not None and plain(said) == plain(answer["value"])
    return _result(said, correct, last_line(text).startswith(answer["mark"])) | {"said": said}


# --- tool calls ------------------------------------------------------------------------------------------------------
_CALL = re.compile(
    r"\bAction[ \t]?\d{0,3}[ \t]?:[ \t*`]{0,9}(?P<action>[^\n]{0,200}?)[\s*`]{0,9}"
    r"\bAction[ \t]?\d{0,3}[ \t]?Input[ \t]?\d{0,3}[ \t]?:[\s*`]*(?:json\b\s*)?"
)


def react_calls(text: str) -> list[dict]:
    """Every (Action, Action Input) of a ReAct text: {"action", "arguments" (None: no JSON object), where they "start", "end"}."""
    calls = []
    for match in _CALL.finditer(text):
        value, end = None, match.end()
        with contextlib.suppress(ValueError, RecursionError):  # no JSON, an integer of 5000 digits, absurd nesting
            value, end = json.JSONDecoder().raw_decode(text, match.end())
        arguments = value if isinstance(value, dict) else None
        calls.append({"action": match["action"].strip("`\"' "), "arguments": arguments, "start": match.end(), "end": end})
    return calls


def structured_calls(text: str) -> list[dict]:
    """The calls of {"tool_calls": [{"Action": ..., "Action_Input": {...}}]}, alone or in a code fence; [] if there are none."""
    calls, body = [], text.strip().removeprefix("```").removeprefix("json").removesuffix("```")
    try:
        for call in json.loads(body)["tool_calls"]:
            arguments = call["Action_Input"] if "Action_Input" in call else call["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            action = str(call["Action"] if "Action" in call else call["name"])
            calls.append({"action": action, "arguments": arguments if isinstance(arguments, dict) else None})
    except (ValueError, RecursionError, TypeError, KeyError):
        return []
    return calls


def same(a: Any, b: Any) -> bool:
    """Are two JSON values equal? 1 is 1.0; True is neither 1 nor "True"."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def given(arguments: dict) -> dict:
    """The arguments that say something: the data sets write "" or null for an optional one that is left out."""
    return {name: value for name, value in arguments.items() if value is not None and value != ""}


def shares(gold: dict, said: dict | None, equal=same) -> tuple[float, float]:
    """(share of gold's arguments that are matched, the same with invented arguments in the denominator)."""
    if said is None:
        return 0.0, 0.0
    gold, said = given(gold), given(said)
    if not gold:  # nothing to match: right only if nothing is said
        return float(not said), float(not said)
    matched = sum(name in said and equal(value, said[name]) for name, value in gold.items())
    return matched / len(gold), matched / len(gold.keys() | said.keys())


def _judge_tools(answer: dict, text: str) -> dict:
    """action, arguments and arguments_penalised (see `shares`) are in [0, 1]: calls are paired in order, a missing or a surplus
    one counts 0. both: action and arguments are 1 (invented arguments are free, as in the official score). lenient: the same,
    arguments compared as text. correct: nothing missing, nothing invented.
    """
    gold, react = answer["calls"], react_calls(text)
    calls = react or structured_calls(text)
    count = max(len(gold), len(calls), 1)
    pairs = [(right["arguments"], said["arguments"]) for right, said in zip(gold, calls, strict=False)]
    matched, penalised = (sum(each) / count for each in zip((0, 0), *(shares(*pair) for pair in pairs), strict=True))
    as_text = sum(shares(*pair, equal=lambda a, b: str(a).strip() == str(b).strip())[0] for pair in pairs) / count
    action = float([call["action"] for call in gold] == [call["action"] for call in calls])
    result = _result(calls or None, action == penalised == 1.0, bool(react))
    result |= {"action": action, "arguments": matched, "arguments_penalised": penalised}
    return result | {"both": action == matched == 1.0, "lenient": action == as_text == 1.0}


# --- code ------------------------------------------------------------------------------------------------------------
def joined(*parts: str) -> str:
    """Parts of a program as one. A later one may begin with `from __future__`, which Python wants to see first."""
    program, trees = "\n".join(parts), [*map(parse_python, parts)]
    if parse_python(program) or not all(trees):
        return program
    late = lambda node: not (isinstance(node, ast.ImportFrom) and node.module == "__future__")
    return ast.unparse(ast.Module(sorted((node for tree in trees for node in tree.body), key=late), []))


def _judge_code(answer: dict, text: str) -> dict:
    """What can be said before the tests have run; "program" is what they are run against."""
    parts, strict = find_code(text, answer["entry"])
    if not parts:
        return {"correct": False, "abstained": True, "strict": False, "reason": "no code"}
    return {"correct": False, "abstained": False, "strict": strict, "program": joined(answer["prelude"], *parts)}


JUDGES = {"choice": _judge_choice, "number": _judge_number, "text": _judge_text, "tools": _judge_tools, "code": _judge_code}
JUDGES["none"] = lambda answer, text: _result(None, False, False)
