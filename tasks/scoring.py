"""scoring.py - was it answered? How a completion is judged, for every kind of answer but the tiny world's.

`Example.answer` says what is compared, as plain data; its "kind" says how:

    choice   {"letter": "B", "options": [...]}                the letter that is stated
    number   {"value": "72", "mark": "####"}                  the number that is stated, as a decimal
    text     {"value": "Paris", "mark": "Answer:"}            exact, except for case, spaces and punctuation of prose
    tools    {"calls": [{"action": ..., "arguments": {}}]}    all calls, in order, by parsed JSON values
    code     {"entry": "f", "tests": [...], "prelude": ""}    the tests, run in sandbox.py
    None     nothing to compare with: never correct, always abstained

Every result has correct (a lenient reading: the answer counts, not its form), abstained (no answer was found) and strict
(correct, and in the very format that the question asks for), then what its kind adds. It exists because an accuracy is worth no
more than the reading of the answers: a model must gain neither by being vague nor by the mere form of an answer.

Depends on data.py, said.py, programs.py, sandbox.py.   Try it:  python -m pytest tests/test_benchmarks.py -q
"""

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from tasks.data import Example
from tasks.programs import find_code, parse_python
from tasks.said import NUMBER, as_number, last_line, plain, said_letter, said_number, said_text
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
    return results


def _result(said: Any, correct: bool, in_format: bool) -> dict:
    return {"correct": correct, "abstained": said is None, "strict": correct and in_format}


# --- letters, numbers, texts -----------------------------------------------------------------------------------------
def _judge_choice(answer: dict, text: str) -> dict:
    said = said_letter(text, answer["options"])
    return _result(said, said == answer["letter"], last_line(text) == f"Answer: {answer['letter']}") | {"said": said}


def _judge_number(answer: dict, text: str) -> dict:
    said, value = said_number(text, answer["mark"]), as_number(answer["value"])
    form = rf"{re.escape(answer['mark'])}\s?(?:{NUMBER})%?\.?"
    return _result(said, said is not None and said == value, bool(re.fullmatch(form, last_line(text).replace("−", "-"))))


def _judge_text(answer: dict, text: str) -> dict:
    said = said_text(text, answer["mark"])
    correct = said is not None and plain(said) == plain(answer["value"])
    return _result(said, correct, last_line(text).startswith(answer["mark"])) | {"said": said}


# --- tool calls ------------------------------------------------------------------------------------------------------
_CALL = re.compile(  # lines may be dressed: "- Action:", "### Action:", "**Action**:", "2. Action Input:"
    r"(?<![^\W_])Action[ \t]?\d{0,3}[ \t*_]{0,3}[:：][ \t*`_]{0,9}\n?(?P<action>[^\n]{0,200}?)[ \t*`]{0,9}\s"
    r"[\s*`_#>•-]{0,12}(?:\d[.)]\s\**)?Action[ \t_]?\d{0,3}[ \t]?Input[ \t]?\d{0,3}[ \t*_]{0,3}[:：][\s*`_~]*(?:json\b\s*)?",
    re.I,
)
_JSON = re.compile(r'\{\s{0,99}"|\[\s{0,99}\{\s{0,99}"')


def json_object(text: str, start: int = 0) -> tuple[dict | None, int]:
    """(the JSON object that begins at `start`, or None, where it ends)."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):  # no JSON, an integer of 5000 digits, absurd nesting
        return None, start
    return (value if isinstance(value, dict) else None), end


def react_calls(text: str) -> list[dict]:
    """Every (Action, Action Input) of a ReAct text: {"action", "arguments" (None: no JSON object), where they "start", "end"}."""
    calls, place = [], 0
    while match := _CALL.search(text, place):
        start = match.end()
        arguments, end = json_object(text, start)
        calls.append({"action": match["action"].strip("`\"' "), "arguments": arguments, "start": start, "end": end})
        # What stands inside of an argument is no call, even where the argument is broken.
        place = end if end > start or match[0].endswith("\n") else start + len(text[start:].partition("\n")[0])
    return calls


def json_calls(value: Any) -> list[dict]:
    """The calls of a JSON value: {"tool_calls": [...]}, a list, or one call with Action and Action_Input, or name and arguments.
    Raises KeyError, TypeError or AttributeError if it is none.
    """
    calls = []
    value = value["tool_calls"] if isinstance(value, dict) and "tool_calls" in value else value
    for call in value if isinstance(value, list) else [value]:
        call = {name.lower().replace(" ", "_"): part for name, part in call.get("function", call).items()}
        name = call["action"] if "action" in call else call["name"]
        arguments = call[next((key for key in ("action_input", "arguments") if key in call), "parameters")]
        arguments = json_object(arguments.strip())[0] if isinstance(arguments, str) else arguments
        calls.append({"action": str(name), "arguments": arguments if isinstance(arguments, dict) else None})
    return calls


def structured_calls(text: str) -> list[dict]:
    """The calls of JSON in <tool_call> tags, else anywhere in the text; [] if there are none, or one cannot be read."""
    tagged = "\n".join(re.findall(r"<tool_calls?>(.*?)(?:</tool_calls?>|\Z)", text, re.DOTALL | re.I))
    text, calls, place = tagged or text, [], 0
    while match := _JSON.search(text, place):
        try:
            value, place = json.JSONDecoder().raw_decode(text, match.start())
            calls += json_calls(value)
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
            if tagged or isinstance(error, ValueError | RecursionError):  # other JSON in a text is no call
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
    structured = structured_calls(text) if not react or text.lstrip()[:1] in ("{", "[", "`", "<") else []
    calls = structured or react  # what looks like ReAct may stand inside of an argument
    count = max(len(gold), len(calls), 1)
    pairs = [(right["arguments"], said["arguments"]) for right, said in zip(gold, calls, strict=False)]
    matched, penalised = (sum(each) / count for each in zip((0, 0), *(shares(*pair) for pair in pairs), strict=True))
    as_text = sum(shares(*pair, equal=lambda a, b: str(a).strip() == str(b).strip())[0] for pair in pairs) / count
    action = float([call["action"] for call in gold] == [call["action"] for call in calls])
    result = _result(calls or None, action == penalised == 1.0, not structured)
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
