"""benchmarks.py - a whole data set -> a Task: the paper's from the hub, and yours from a file.

    task, manifest = load_task("scienceqa", train_size=2000, test_size=500)
    task, manifest = load_jsonl("my_questions.jsonl")

What: draw, convert (records.py), add proven negatives (negatives.py), and write down in the manifest what was read, kept, dropped
and why. For a name and a seed the examples and their order are the same, whatever the recipe; the test examples are the same
for every seed. `datasets` is imported only when a data set of the hub is asked for, and code from the hub is never run.

Your file has a JSON object on each line:

    question   what is asked                                  reference  a worked solution; only teachers see it
    answer     optional: a text or a number                   negative   optional: a wrong reference
    choices    optional: a list of texts; the answer is one of them, its letter, or its index from 0
    tests      optional: Python statements, a list; the       context    optional: a text to read first
               reference is then code, or has it in a fence
    split      optional: "train" or "test"; without it a share of the questions is held back as test

A line with choices is scored by the letter, with tests by running them, with an answer alone by comparing. With none of these
nothing can be scored: only losses and drift then mean something.

Not like the official code: every method is trained on the same examples (there, contrast on MBPP saw a third of them), and a
record that cannot be used is counted, not lost.

Depends on data.py, records.py, scoring.py, negatives.py.   Try it:  python -m pytest tests/test_benchmarks.py -q
"""

import hashlib
import json
import math
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from data import Example, Task
from negatives import add_negatives
from records import BENCHMARKS, Benchmark, Skip, choice_example, code_example, paragraphs
from scoring import FENCE, LETTERS, as_number, last_line, score_all

# --- the paper's data sets -------------------------------------------------------------------------------------------


def load_task(
    name: str, *, train_size: int | None = 0, test_size: int = 0, seed: int = 0, negatives: bool = True
) -> tuple[Task, dict]:
    """A data set of BENCHMARKS, by name. Sizes of 0 mean all; train_size None: only evaluate, read no training data.

    Raises ValueError if there is no such data set, if it may not be trained on, or if it cannot be loaded.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"--data {name}: no such data set; there are {', '.join(BENCHMARKS)}, or give a .jsonl file")
    if min(train_size or 0, test_size) < 0:
        raise ValueError(f"a size of {min(train_size or 0, test_size)} is negative; 0 takes all there is")
    benchmark = BENCHMARKS[name]
    if benchmark.evaluation_only and train_size is not None:
        used_by = ", ".join(b.name for b in BENCHMARKS.values() if b.ood == name)
        raise ValueError(
            f"--data {name} is for evaluation only, nothing may be trained on it"
            + (f"; train on {used_by}, which is also tested on it" if used_by else "")
        )
    manifest = {"data": name, "hub": benchmark.hub, "config": benchmark.config, "seed": seed}
    train: list[Example] = []
    if train_size is not None:
        train, manifest["train"] = draw(benchmark, "train", train_size, seed)
        if negatives:
            train, manifest["negatives"] = add_negatives(train, seed)
    test, manifest["test"] = draw(benchmark, "test", test_size, seed)
    ood: list[Example] = []
    if benchmark.ood:
        try:
            ood, manifest["ood"] = draw(BENCHMARKS[benchmark.ood], "test", test_size, seed)
        except ValueError as error:
            warnings.warn(f"no out-of-distribution test: {error}", stacklevel=2)
            manifest["ood"] = {"data": benchmark.ood, "error": str(error)}
    task = Task(name, train, test, score_all, ood)
    return task, manifest | {"fingerprint": task.fingerprint()}


def score(task: str, example: Example, completion: str) -> dict:
    """One completion, judged as a question of `task` (for many use `score_all`). Raises ValueError if it is another
    task's.
    """
    if task != example.task:
        raise ValueError(f"this example belongs to task {example.task!r}, not to {task!r}")
    return score_all([example], [completion])[0]


def draw(benchmark: Benchmark, side: str, size: int, seed: int) -> tuple[list[Example], dict]:
    """`size` examples (0 = all) of the "train" or the "test" side, and what became of the records that were looked at.

    Training examples come in the order of a shuffle by the seed. Test examples are a draw that is the same for every seed, in
    the order of the data set. Raises ValueError if no record can be used.
    """
    seed = seed if side == "train" else 0  # of the options, too: a test question looks the same in every run
    rows = _rows(benchmark, side)
    order = random.Random(f"{benchmark.name}-{side}-{seed}").sample(range(len(rows)), len(rows))
    kept, dropped, read = {}, Counter(), 0
    for index in order:
        if size and len(kept) == size:
            break
        read += 1
        try:
            kept[index] = benchmark.to_example(rows[index], index, seed)
        except Skip as skip:
            dropped[str(skip)] += 1
    if not kept:
        raise ValueError(f"--data {benchmark.name}: no record of its {side} side can be used: {dict(dropped)}")
    count = {"data": benchmark.name, "rows": len(rows), "read": read, "kept": len(kept), "dropped": dict(dropped)}
    return [kept[i] for i in (kept if side == "train" else sorted(kept))], count


def _rows(benchmark: Benchmark, side: str) -> Sequence[dict]:
    """The raw records of the "train" or "test" side. Tests put their own in its place."""
    try:
        import datasets  # here, so that nothing else needs it
    except ImportError:
        raise ValueError(f"--data {benchmark.name} needs the datasets package: pip install datasets") from None
    split, config = benchmark.train, benchmark.config
    if side == "test":
        split, config = benchmark.test, benchmark.test_config or benchmark.config
    try:
        rows = datasets.load_dataset(benchmark.hub, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # unreachable or gated; no such config or split; a script
        raise ValueError(_explain(benchmark, str(error))) from error
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):  # whether there is one is all that matters: it need not be decoded
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _explain(benchmark: Benchmark, error: str) -> str:
    if any(sign in error.lower() for sign in ("gated", "401", "403")):
        return f"--data {benchmark.name}: {benchmark.hub} is gated; accept its terms on its hub page, then run `hf auth login`"
    first = error.strip().split("\n")[0]
    return (
        f"--data {benchmark.name}: {benchmark.hub} is not cached here and could not be fetched ({first}); "
        "connect once, or use --data tiny or a .jsonl file"
    )


# --- your own file ---------------------------------------------------------------------------------------------------

FIELDS = "question reference answer choices tests negative context split".split()
EXACT = """{question}

Work it out, then end with one line that holds {what} and nothing else, like this:
Answer: <{what}>"""


def load_jsonl(path: str | Path, *, test_share: float = 0.2, seed: int = 0) -> tuple[Task, dict]:
    """A Task from your own file (see the top of this one). A bad line is reported by its number, and costs nothing but itself.
    The seed only picks the negatives.

    Raises ValueError if the file cannot be read, if no line is good, or if the good ones leave nothing to train on or to test.
    """
    try:
        content = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"--data {path}: cannot be read ({error.strerror})") from error
    good: list[tuple[Example, str | None]] = []
    bad, unknown = [], {}
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = _parse_line(line)
            unknown |= dict.fromkeys(k for k in record if k not in FIELDS)
            good.append((_line_example(record), record.get("split")))
        except Skip as skip:
            bad.append({"line": number, "reason": str(skip)})
    told = "; ".join(f"line {b['line']}: {b['reason']}" for b in bad[:10]) + ("; ..." if len(bad) > 10 else "")
    if not good:
        raise ValueError(f"--data {path}: no line can be used ({told or 'the file is empty'})")
    if bad:
        warnings.warn(f"{path}: {len(bad)} of {len(bad) + len(good)} lines are left out: {told}", stacklevel=2)
    if unknown:
        warnings.warn(
            f"{path}: unknown fields {', '.join(unknown)} are ignored; known are {', '.join(FIELDS)}", stacklevel=2
        )
    train, test = _split(path, good, test_share)
    train, counts = add_negatives(train, seed)
    task = Task(Path(path).stem, train, test, score_all)
    manifest = {"data": str(path), "seed": seed, "lines": len(bad) + len(good), "bad_lines": bad, "negatives": counts}
    manifest |= {"kinds": dict(Counter(e.task for e, _ in good)), "train": len(train), "test": len(test)}
    if "unscored" in manifest["kinds"]:
        manifest["note"] = "nothing to score: only losses and drift are meaningful"
    return task, manifest | {"unknown_fields": list(unknown), "fingerprint": task.fingerprint()}


def _parse_line(line: bytes) -> dict:
    """The JSON object on a line, without fields that are null. Raises Skip."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise Skip("not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Skip(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise Skip(f"not a JSON object but a {type(record).__name__}")
    return {key: value for key, value in record.items() if value is not None}


def _checked(record: dict, name: str, needed: bool = False) -> str:
    """A field that is a text. Raises Skip if it is another thing, or missing or empty."""
    if name not in record and not needed:
        return ""
    return _checked_text(record.get(name), f"field {name!r}")


def _checked_text(value, what: str) -> str:
    if value is None:
        raise Skip(f"{what} is missing")
    if not isinstance(value, str):
        raise Skip(f"{what} must be a text, but is of type {type(value).__name__}")
    if not value.strip():
        raise Skip(f"{what} is empty")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise Skip(f"{what} holds half a surrogate pair, which is no character")
    return value.replace("\r\n", "\n").strip()


def _checked_list(record: dict, name: str) -> list[str]:
    value = record.get(name, [])
    if not isinstance(value, list) or (name in record and not value):
        raise Skip(f"field {name!r} must be a list of texts with something in it")
    return [_checked_text(x, f"an item of field {name!r}") for x in value]


def _line_example(record: dict) -> Example:
    """What a line asks, by the fields it has. Raises Skip."""
    question, reference = _checked(record, "question", needed=True), _checked(record, "reference", needed=True)
    context, negative = _checked(record, "context"), _checked(record, "negative")
    choices, tests, answer = _checked_list(record, "choices"), _checked_list(record, "tests"), record.get("answer")
    if record.get("split", "train") not in ("train", "test"):
        raise Skip('field \'split\' must be "train" or "test"')
    if choices and tests:
        raise Skip("choices and tests exclude each other")
    question = paragraphs(f"Context: {context}" if context else "", question)
    if choices:
        e = _ending(choice_example("choice", question, choices, _chosen(choices, answer), ""), reference)
    elif tests:
        e = code_example("code", question, _unfenced(reference), tests)
        if reference != _unfenced(reference):
            e = replace(e, reference=reference)  # what stands around the code stays
        negative = f"```python\n{negative}\n```" if negative and negative == _unfenced(negative) else negative
    elif answer is not None:
        e = _exact_example(question, reference, answer)
    else:
        e = Example("unscored", question, reference)
    return replace(e, negative=negative)


def _unfenced(text: str) -> str:
    """The last complete code fence of a text, or all of it if it has none."""
    fences = [m["code"] for m in FENCE.finditer(text)]
    return fences[-1] if fences else text


def _ending(e: Example, reference: str) -> Example:
    """The example with this reference, made to end in the answer line of e's own. Raises Skip if it ends in another one."""
    if not last_line(reference).startswith("Answer:"):
        return replace(e, reference=paragraphs(reference, last_line(e.reference)))
    if not score(e.task, e, reference)["correct"]:
        raise Skip(f"the reference ends in {last_line(reference)!r}, which is not the answer")
    return replace(e, reference=reference)


def _chosen(choices: list[str], answer) -> int:
    """Which choice the answer is: one of the texts, else a letter, or an index (a number) from 0. Raises Skip."""
    texts = [c.casefold() for c in choices]
    if len(set(texts)) < len(choices):
        raise Skip("two choices are the same")
    if answer is None:
        raise Skip("field 'answer' is missing: with choices there must be one")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        if answer.strip().casefold() in texts:
            return texts.index(answer.strip().casefold())
        letter = answer.strip(" ().").upper()
        if len(letter) == 1 and letter in LETTERS[: len(choices)]:
            return LETTERS.index(letter)
    raise Skip(f"the answer {answer!r} is not among the choices")


def _exact_example(question: str, reference: str, answer) -> Example:
    """A question whose answer is compared: as a number if it is one, else as a text. Raises Skip."""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        if not math.isfinite(answer):
            raise Skip("the answer is not a finite number")
        answer = f"{Decimal(repr(answer)):f}"
    answer = _checked_text(answer, "field 'answer'")
    kind = "text" if as_number(answer) is None else "number"
    what = "the answer" if kind == "text" else "the number"
    e = Example(
        task=kind,
        question=EXACT.format(question=question, what=what),
        reference=f"Answer: {answer}",
        answer={"kind": kind, "value": answer, "mark": "Answer:"},
    )
    if not score(e.task, e, e.reference)["correct"]:
        raise Skip("field 'answer' must be one short line that can be read back")
    return _ending(e, reference)


def _split(path, good: list[tuple[Example, str | None]], share: float) -> tuple[list[Example], list[Example]]:
    """(train, test), each in the order of the file. Without a split field, by a hash of the question and never by the seed:
    what one run was trained on, no other may be tested on. Two lines that ask the same never part.
    """
    if any(side for _, side in good):
        chosen = {id(e) for e, side in good if side == "test"}  # a line that does not say is for training
        advice = 'give both sides a line, by split "train" and "test"'
    elif not 0 < share < 1:
        raise ValueError(f"test_share {share} must lie between 0 and 1: some questions are needed on both sides")
    else:
        ranked = sorted({e.question for e, _ in good}, key=lambda q: hashlib.sha256(q.encode()).digest())
        held_back = set(ranked[: max(1, round(share * len(ranked)))])
        chosen = {id(e) for e, _ in good if e.question in held_back}
        advice = "it needs two different questions at least"
    train, test = ([e for e, _ in good if (id(e) in chosen) is side] for side in (False, True))
    if not train or not test:
        raise ValueError(f"--data {path}: the good lines leave nothing to {'test' if train else 'train on'}; {advice}")
    return train, test
