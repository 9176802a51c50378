"""jsonl.py - your own questions: a file with a JSON object on each line -> a Task.

    task, manifest = load_jsonl("my_questions.jsonl")

    question   what is asked                                  reference  a worked solution; only teachers see it
    answer     optional: a text or a number                   negative   optional: a wrong reference
    choices    optional: a list of texts; the answer is one of them, its letter, or its index from 0
    tests      optional: Python statements, a list; the       context    optional: a text to read first
               reference is then code, or has it in a fence
    split      optional: "train" or "test"; without it a share of the questions is held back as test

A line with choices is scored by the letter, with tests by running them, with an answer alone by comparing: as a number where the
answer is one ("1,200" is 1200), else as a whole text, whatever its case and the punctuation of prose ("C#" is not "C"). With none
of these a line trains but is not scored. It exists so that your own questions need no code, and no mistake in them goes unnoticed:
bad lines are left out, odd ones used, and the manifest names both.

Depends on data.py, records.py, said.py, scoring.py, negatives.py.   Try it:  python -m pytest tests/test_jsonl.py -q
"""

import hashlib
import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from tasks.data import Example, Task
from tasks.negatives import add_negatives
from tasks.programs import defines, fences
from tasks.records import Skip, choice_example, code_example, paragraphs, unix
from tasks.said import LETTERS, as_number, last_line
from tasks.scoring import joined, score_all

FIELDS = "question reference answer choices tests negative context split".split()
EXACT = """{question}

Work it out, then end with one line that holds {what} and nothing else:
Answer: ..."""


@dataclass(frozen=True)
class Line:
    """A good line of the file: where it stands, what it asks, and the side it chose ("" = none)."""

    number: int
    example: Example
    split: str = ""


def is_file(data: str) -> bool:
    """Does --data name a file of your own, rather than a data set?"""
    return Path(data).suffix.lower() in (".jsonl", ".json", ".ndjson")


def load_jsonl(
    path: str | Path, *, train_size: int = 0, test_size: int = 0, test_share: float = 0.2, seed: int = 0, negatives: bool = True
) -> tuple[Task, dict]:
    """A Task from your own file (see the top of this one), and the manifest of what became of its lines. Sizes of 0 mean all.
    The seed only picks the negatives; without `negatives` none are made and no code is run.
    Raises ValueError if the file cannot be read, if no line is good, or if the good ones leave nothing to train on or to test.
    """
    warn = lambda message: warnings.warn(f"{path}: {message}", stacklevel=3)
    content = read_bytes(path)
    good, bad, unknown = read_lines(content)
    reasons = "; ".join([f"{places(numbers)}: {reason}" for reason, numbers in bad.items()][:10] + ["..."] * (len(bad) > 10))
    if not good:
        raise ValueError(f"--data {path}: no line can be used ({reasons or 'the file is empty'})")
    dropped = sum(map(len, bad.values()))
    if bad:
        warn(f"{dropped} of {dropped + len(good)} lines are left out: {reasons}")
    if unknown:
        warn(f"unknown fields {', '.join(unknown)} are ignored; known are {', '.join(FIELDS)}")
    train, test = split_lines(path, good, test_share)
    cuts = ((train, train_size, "training", "--train-size"), (test, test_size, "held-out", "--eval-size, of eval.py --size"))
    for lines, size, side, flag in cuts:
        if 0 < size < len(lines):
            warn(f"{size} of {len(lines)} {side} lines are used ({flag}; 0 = all)")
            del lines[size:]
    manifest = {"data": str(path), "sha256": hashlib.sha256(content).hexdigest(), "seed": seed}
    manifest |= {"lines": dropped + len(good), "bad_lines": bad, "unknown_fields": unknown}
    manifest |= {"kinds": dict(Counter(line.example.task for line in good)), "train": len(train), "test": len(test)}
    manifest["odd_lines"] = odd = odd_lines(good)
    if negatives:
        examples, manifest["negatives"] = add_negatives([line.example for line in train], seed)
        train = [replace(line, example=example) for line, example in zip(train, examples, strict=True)]
        if failing := failing_lines(train + test):
            odd["the reference fails its own tests"] = failing
    for what, numbers in odd.items():
        warn(f"{places(numbers)}: {what}")
    if "unscored" in manifest["kinds"]:
        manifest["note"] = "lines without answer, choices and tests are not scored: of them only losses and drift tell"
    task = Task(Path(path).stem, [line.example for line in train], [line.example for line in test], score_all)
    return task, manifest | {"fingerprint": task.fingerprint()}


def in_short(manifest: dict) -> str:
    """The manifest of load_jsonl in one line."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in manifest["kinds"].items())
    found = f"; wrong references for {manifest['negatives']['found']} of {manifest['train']}" if "negatives" in manifest else ""
    return f"{manifest['data']}: {kinds}; {manifest['train']} to train on, {manifest['test']} held out{found}"


# --- the file -> lines
def read_bytes(path) -> bytes:
    """The file's bytes, if it can be a JSON object a line. Raises ValueError."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"--data {path}: cannot be read ({error.strerror})") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"--data {path}: this is UTF-16; save it as UTF-8")
    if content.lstrip().startswith(b"["):
        try:
            json.loads(content)
        except (ValueError, RecursionError):
            pass  # it only begins like one: its lines are looked at one by one
        else:
            raise ValueError(f"--data {path}: this is one JSON array; write each of its objects on a line of its own")
    return content.removeprefix(b"\xef\xbb\xbf")


def read_lines(content: bytes) -> tuple[list[Line], dict[str, list[int]], list[str]]:
    """-> (the good lines, {why a line is bad: the numbers of such lines}, the names of unknown fields)."""
    good, bad, unknown = [], defaultdict(list), {}
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = parse_line(line)
            unknown |= dict.fromkeys(name for name in record if name not in FIELDS)
            good.append(Line(number, line_example(record), record.get("split", "")))
        except Skip as skip:
            bad[str(skip)].append(number)
    return good, dict(bad), list(unknown)


def places(numbers: Sequence[int], shown: int = 8) -> str:
    """[4] -> "line 4", [4, 7] -> "lines 4, 7"; of many the first few and how many there are."""
    text = ", ".join(map(str, numbers[:shown])) + (f", ... ({len(numbers)} in all)" if len(numbers) > shown else "")
    return ("line " if len(numbers) == 1 else "lines ") + text


def odd_lines(good: Iterable[Line]) -> dict[str, list[int]]:
    """What can be used but is hardly meant: {what: the numbers of such lines}."""
    by_question, odd = defaultdict(list), defaultdict(list)
    for line in good:
        by_question[line.example.question].append(line)
    for first, *rest in by_question.values():
        if len({line.split == "test" for line in (first, *rest)}) == 2:
            odd["the same question to train on and to test"] += [line.number for line in (first, *rest)]
        if any(line.example.answer != first.example.answer for line in rest):
            odd["the same question with different answers"] += [line.number for line in (first, *rest)]
        elif any(line.example.reference == first.example.reference for line in rest):
            odd["the same question and reference again"] += [line.number for line in rest]
    return {what: sorted(numbers) for what, numbers in odd.items()}


def failing_lines(lines: Sequence[Line]) -> list[int]:
    """The lines whose reference is code that fails their tests. (One that has a proven negative has been found right.)"""
    unproven = [line for line in lines if line.example.task == "code" and not line.example.negative]
    results = score_all([line.example for line in unproven], [line.example.reference for line in unproven])
    return sorted(line.number for line, result in zip(unproven, results, strict=True) if not result["correct"])


def split_lines(path, good: list[Line], share: float) -> tuple[list[Line], list[Line]]:
    """(train, test), each in the order of the file. Without a split field, by a hash of the question and never by the seed:
    what one run was trained on, no other may be tested on. Two lines with the same question stay together.
    Raises ValueError if a side is left empty.
    """
    if any(line.split for line in good):
        held_back = {line.number for line in good if line.split == "test"}  # a line that does not say is for training
        advice = 'give both sides a line, by split "train" and "test"'
    elif not 0 < share < 1:
        raise ValueError(f"test_share {share} must lie between 0 and 1: some questions are needed on both sides")
    else:
        ranked = sorted({line.example.question for line in good}, key=lambda q: hashlib.sha256(q.encode()).digest())
        chosen = set(ranked[: max(1, round(share * len(ranked)))])
        held_back = {line.number for line in good if line.example.question in chosen}
        advice = "it needs two different questions at least"
    train, test = ([line for line in good if (line.number in held_back) is side] for side in (False, True))
    if not train or not test:
        raise ValueError(f"--data {path}: the good lines leave nothing to {'test' if train else 'train on'}; {advice}")
    return train, test


# --- a line -> an Example; all of these raise Skip, with what is wrong
def parse_line(line: bytes) -> dict:
    """The JSON object on a line, without fields that are null."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise Skip("not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Skip(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise Skip(f"not a JSON object but a {type(record).__name__}")
    return {name: value for name, value in record.items() if value is not None}


def checked_text(value, what: str) -> str:
    """The value without carriage returns and outer blanks, if it is a text with something in it."""
    if value is None:
        raise Skip(f"{what} is missing")
    if not isinstance(value, str):
        raise Skip(f"{what} must be a text, but is of type {type(value).__name__}")
    if not value.strip():
        raise Skip(f"{what} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise Skip(f"{what} holds half a surrogate pair, which is no character")
    return unix(value)


def checked_list(record: dict, name: str) -> list[str]:
    value = record.get(name, [])
    if not isinstance(value, list) or (name in record and not value):
        raise Skip(f"field {name!r} must be a list of texts with something in it")
    return [checked_text(item, f"an item of field {name!r}") for item in value]


def line_example(record: dict) -> Example:
    """What a line asks, by the fields it has."""
    text_of = lambda name: checked_text(record.get(name), f"field {name!r}")
    question, reference = text_of("question"), text_of("reference")
    context, negative = (text_of(name) if name in record else "" for name in ("context", "negative"))
    choices, tests, answer = checked_list(record, "choices"), checked_list(record, "tests"), record.get("answer")
    if record.get("split", "train") not in ("train", "test"):
        raise Skip('field \'split\' must be "train" or "test"')
    if choices and tests:
        raise Skip("choices and tests exclude each other")
    question = paragraphs(f"Context: {context}" if context else "", question)
    if choices:
        example = with_ending(choice_example("choice", question, choices, chosen(choices, answer), ""), reference)
    elif tests:
        fenced = [fence.code for fence in fences(reference)]
        gold = joined(*(code for code in fenced if defines(code, ""))) or (fenced or [reference])[-1]
        example = code_example("code", question, gold, tests)
        if fenced:
            example = replace(example, reference=reference)  # what stands around the code stays
        if negative and not fences(negative):
            negative = f"```python\n{negative}\n```"
    elif answer is not None:
        example = exact_example(question, reference, answer)
    else:
        example = Example("unscored", question, reference)
    return replace(example, negative=negative)


def with_ending(example: Example, reference: str) -> Example:
    """The example with this reference, made to end in the answer line of the example's own."""
    if not last_line(reference).startswith("Answer:"):
        reference = paragraphs(reference, last_line(example.reference))
    elif not score_all([example], [reference])[0]["correct"]:
        raise Skip(f"the reference ends in {last_line(reference)!r}, which is not the answer")
    return replace(example, reference=reference)


def chosen(choices: list[str], answer) -> int:
    """Which choice the answer is: one of the texts, else a letter, or an index (a number) from 0."""
    texts = [choice.casefold() for choice in choices]
    if len(set(texts)) < len(choices):
        raise Skip("two choices are the same")
    if answer is None:
        raise Skip("field 'answer' is missing: with choices there must be one")
    if type(answer) is int and 0 <= answer < len(choices):  # True is no index
        return answer
    said = answer.strip() if isinstance(answer, str) else ""
    for names, name in ((texts, said.casefold()), ([*LETTERS[: len(choices)]], said.strip(" ().").upper())):
        if name in names:
            return names.index(name)
    raise Skip(f"the answer {answer!r} is not among the choices")


def exact_example(question: str, reference: str, answer) -> Example:
    """A question whose answer is compared: as a number if it is one, else as a text."""
    if type(answer) in (int, float):
        if not math.isfinite(answer):
            raise Skip("the answer is not a finite number")
        answer = f"{Decimal(repr(answer)):f}"
    answer = checked_text(answer, "field 'answer'")
    kind, what = ("text", "the answer") if as_number(answer) is None else ("number", "the number")
    compared = {"kind": kind, "value": answer, "mark": "Answer:"}
    example = Example(kind, EXACT.format(question=question, what=what), f"Answer: {answer}", compared)
    if not score_all([example], [example.reference])[0]["correct"]:
        raise Skip("field 'answer' must be one short line that can be read back")
    return with_ending(example, reference)
