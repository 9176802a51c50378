"""bfcl.py - real requests for a function call, from the Berkeley function-calling leaderboard: `--data bfcl`.

The records lie in the Python package bfcl-eval (requirements-real.txt; its code is never run): a request, the documentation of
one to four functions, and for every argument the list of values that count as right, with "" among them if it may be left out.
Three parts of the benchmark are used: simple_python and multiple are divided into training and test questions, for every seed in
the same way; live_simple, which people typed into a public demo, is out of distribution. The reference is a right call. It exists
because a call is an answer that is short, useful, and right or wrong beyond dispute.

A call is right by the leaderboard's own rule: the function's name, no argument that it does not have, every value of the documented
type and among those allowed (texts without case, spaces and , . / - _ * ^), and only what may be missing is missing.

Depends on data.py, records.py.   Try it:  python -m pytest tests/test_bfcl.py -q
"""

import ast
import importlib.util
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.data import Example, Task
from tasks.records import Skip

PARTS = {"train": ("simple_python", "multiple"), "ood": ("live_simple",)}
TEST_SHARE = 0.25  # of the requests of simple_python and multiple
TYPES = dict(string=str, integer=int, float=float, boolean=bool, array=list, tuple=list, dict=dict, any=str)
ASK = """Tools:

{documentation}

Request: {request}

Call the right tool for this request. Reply with one line of this form:
tool_name(argument="text", other_argument=3)"""
MISSING = "--data bfcl: the records are in the package bfcl-eval: pip install --no-deps -r requirements-real.txt"


def load(
    *, train_size: int | None = 0, test_size: int = 0, seed: int = 0, negatives: bool = True, folder: str | Path | None = None
) -> tuple[Task, dict]:
    """-> (Task, what was kept and dropped). Sizes of 0 mean all; train_size None: only evaluate. `folder`: the package's data.

    Raises ValueError if the package is not installed.
    """
    if folder is None:
        found = importlib.util.find_spec("bfcl_eval")
        if not found:
            raise ValueError(MISSING)
        folder = Path(found.origin).parent / "data"
    manifest: dict = {"data": "bfcl", "seed": seed, "dropped": {}}
    known, ood = [parse_part(Path(folder), side, manifest["dropped"]) for side in ("train", "ood")]
    share = lambda e: random.Random(e.question).random()  # of the question alone: what one run trains on, none is tested on
    test = [e for e in known if share(e) < TEST_SHARE]
    train = [e for e in known if share(e) >= TEST_SHARE] if train_size is not None else []
    random.Random(seed).shuffle(train)
    few = lambda examples, size: sorted(examples, key=share)[: size or None]  # the same few for every seed
    train, test, ood = train[: train_size or None], few(test, test_size), few(ood, test_size)
    if negatives:
        pool = [[v for v in said_call(e.reference)[1].values() if isinstance(v, str) and v] for e in train]
        train = [replace(e, negative=wrong_call(e, pool, random.Random(f"{seed}-{i}"))) for i, e in enumerate(train)]
        manifest["negatives"] = {"found": sum(bool(e.negative) for e in train), "missing": sum(not e.negative for e in train)}
    task = Task("bfcl", train, test, score, ood, max_new_tokens=96)
    return task, manifest | {"train": len(train), "test": len(test), "ood": len(ood), "fingerprint": task.fingerprint()}


def parse_part(folder: Path, side: str, dropped: dict) -> list[Example]:
    """The examples of one side; counts in `dropped` why records cannot be used. Raises ValueError if a file is not there."""
    examples, reasons = [], Counter()
    lines = lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for part in PARTS[side]:
        try:
            asked, right = (lines(folder / name) for name in (f"BFCL_v4_{part}.json", f"possible_answer/BFCL_v4_{part}.json"))
        except OSError as error:
            raise ValueError(f"{MISSING} ({error.filename}: {error.strerror})") from error
        answers = {row["id"]: row["ground_truth"] for row in right}
        for row in asked:
            try:
                examples.append(to_example(part, row, answers.get(row["id"])))
            except Skip as skip:
                reasons[str(skip)] += 1
    dropped[side] = dict(reasons)
    return examples


def to_example(part: str, row: dict, truth: list | None) -> Example:
    """One record -> the Example. Raises Skip."""
    turns = [message for turn in row["question"] for message in turn]
    if not truth or len(truth) != 1 or {m["role"] for m in turns} - {"system", "user"}:
        raise Skip("not one request with one call")
    (name, allowed), *_ = truth[0].items()
    function = next((f for f in row["function"] if f["name"] == name), None)
    if not function:
        raise Skip("the right function is not documented")
    kinds = {n: (p.get("type"), p.get("items", {}).get("type")) for n, p in function["parameters"]["properties"].items()}
    required = function["parameters"].get("required", [])
    answer = {"name": name, "allowed": allowed, "kinds": kinds, "required": required}
    answer["others"] = [f["name"] for f in row["function"] if f["name"] != name]
    documentation = "\n\n".join(map(document, row["function"]))
    question = ASK.format(documentation=documentation, request="\n\n".join(m["content"].strip() for m in turns))
    given = {n: example_value(v) for n, v in allowed.items() if "" not in v or n in required}
    example = Example(part, question, spell(name, given), answer)
    if not score([example], [example.reference])[0]["correct"]:
        raise Skip("its right answer breaks its own rule")
    return example


def document(function: dict) -> str:
    """A function and its arguments as a list: what looks like the head of a Python function makes a small model write its body."""
    properties, required = function["parameters"]["properties"], function["parameters"].get("required", [])
    lines = [f"{function['name']}: {function['description'].strip()}"]
    for name, p in properties.items():
        choices = f" One of: {', '.join(map(str, p['enum']))}." if p.get("enum") else ""
        optional = "" if name in required else ", optional"
        lines.append(f"- {name} ({p.get('type')}{optional}): {p.get('description', '').strip()}{choices}")
    return "\n".join(lines)


def example_value(allowed: Any) -> Any:
    """The first allowed value; inside a dictionary each key has a list of its own."""
    value = next((v for v in allowed if v != ""), "")
    pick = lambda d: {k: example_value(v) for k, v in d.items() if "" not in v} if isinstance(d, dict) else d
    return [pick(item) for item in value] if isinstance(value, list) else pick(value)


def spell(name: str, arguments: dict) -> str:
    """f, {"a": 1, "b": "x"} -> "f(a=1, b='x')"."""
    return f"{name}({', '.join(f'{n}={v!r}' for n, v in arguments.items())})"


# --- is a call right? ------------------------------------------------------------------------------------------------


def said_call(text: str) -> tuple[str, dict] | None:
    """The last call with nothing but literal keyword arguments in a text -> (name, arguments), or None."""
    starts = [match.start() for match in re.finditer(r"(?<![\w.])[A-Za-z_][\w.]{0,99}\s?\(", text)]
    for start in starts[:-50:-1]:  # bounded: a model may write a thousand brackets
        for end in [i + 1 for i, character in enumerate(text) if character == ")" and i > start][:20]:
            try:
                node = ast.parse(text[start:end].strip(), mode="eval").body
                if isinstance(node, ast.Call) and not node.args and all(k.arg for k in node.keywords):
                    return ast.unparse(node.func), {k.arg: ast.literal_eval(k.value) for k in node.keywords}
            except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
                continue
    return None


def score(examples: Sequence[Example], completions: Sequence[str]) -> list[dict]:
    """-> {"correct", "abstained", "strict" (nothing but the call was said), "name" (the right function)} for each completion."""
    results = []
    for example, text in zip(examples, completions, strict=True):
        call = said_call(text)
        correct = call is not None and is_right(*call, example.answer)
        alone = text.strip().startswith(call[0]) and text.strip().endswith(")") if call else False
        right_name = call is not None and call[0] == example.answer["name"]
        results.append({"correct": correct, "abstained": call is None, "strict": correct and alone, "name": right_name})
    return results


def is_right(name: str, arguments: dict, answer: dict) -> bool:
    """The leaderboard's rule for one call (see the top of the file)."""
    allowed, kinds = answer["allowed"], answer["kinds"]
    if name != answer["name"] or any(n not in arguments for n in answer["required"]):
        return False
    if any(n not in kinds or n not in allowed or not fits(v, allowed[n], *kinds[n]) for n, v in arguments.items()):
        return False
    return all(n in arguments or "" in values for n, values in allowed.items())


def fits(value: Any, allowed: list, kind: str, item: str | None) -> bool:
    """Is a value of the documented type, and one of those allowed? An int may stand for a float, a tuple for its list."""
    value = float(value) if kind == "float" and type(value) is int else value
    value = list(value) if kind == "tuple" and type(value) is tuple else value
    kept = next((type(a) for a in allowed if a != ""), None)  # the type that the answers have: a text for a variable's name
    if type(value) not in (kept, TYPES[kind]):
        return False
    if type(value) is not TYPES[kind] or kept not in (None, TYPES[kind]):
        return value in allowed
    if kind == "dict":
        return any(dict_fits(value, a) for a in allowed if a != "")
    if TYPES[kind] is list:
        allowed = [[] if a == "" else a for a in allowed]  # what may be left out may also be empty
        first = lambda a: next((type(v) for v in a if v != ""), None)  # an item has the documented type, or that of the first
        if not any(not a or all(type(v) in (TYPES.get(item), first(a)) for v in value) for a in allowed if isinstance(a, list)):
            return False
        if item == "dict":
            lists = [a for a in allowed if isinstance(a, list) and len(a) == len(value)]
            return any(all(dict_fits(v, d) for v, d in zip(value, a, strict=True)) for a in lists)
    return bare(value) in [bare(a) for a in allowed if type(a) is type(value)]


def dict_fits(value: Any, allowed: dict) -> bool:
    """Every key allowed, each with one of its values; only what may be missing is missing."""
    if not isinstance(value, dict) or any(k not in allowed or bare(v) not in map(bare, allowed[k]) for k, v in value.items()):
        return False
    return all(k in value or "" in values for k, values in allowed.items())


def bare(value: Any) -> Any:
    """A text, or the texts in a list, without what does not count."""
    if isinstance(value, list):
        return [bare(v) if isinstance(v, str) else v for v in value]
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value


# --- wrong calls -----------------------------------------------------------------------------------------------------


def wrong_call(example: Example, pool: Sequence[Sequence[str]], rng: random.Random) -> str:
    """A plausible call that the rule calls wrong: one argument with another value, or another function. "" if none is found."""
    candidates = list(wrong_calls(example, pool, rng))
    shuffled = rng.sample(candidates, len(candidates))
    results = zip(shuffled, score([example] * len(shuffled), shuffled), strict=True)
    return next((text for text, result in results if not result["correct"] and not result["abstained"]), "")


def wrong_calls(example: Example, pool: Sequence[Sequence[str]], rng: random.Random) -> Iterator[str]:
    """Candidates: other documented functions, numbers nearby, texts of the pool, which has those of every other call."""
    name, arguments = said_call(example.reference)
    yield from (spell(other, arguments) for other in example.answer["others"])
    for key, value in arguments.items():
        others: list = []
        if isinstance(value, bool):
            others = [not value]
        elif isinstance(value, int | float):
            others = [value + 1, value * 2 + 1]
        elif isinstance(value, list) and value:
            others = [value[:-1]] if len(value) > 1 else []
        elif isinstance(value, str):
            texts = [text for call in rng.sample(pool, min(20, len(pool))) for text in call]
            others = [text for text in texts if bare(text) != bare(value)][:2]
        yield from (spell(name, arguments | {key: other}) for other in others)
