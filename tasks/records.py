"""records.py - one raw record of a data set -> one Example, in the format that its question asks for.

`BENCHMARKS` has a line for each data set of the paper, and `Benchmark.to_example` turns one of its records into the whole user
message, a worked reference in the very format that the message asks for, and what scoring.py compares. `choice_example` and
`code_example` also serve your own file, see jsonl.py. It exists so that a reference would be scored as right: a teacher shown a
solution in another format than the one asked for passes the wrong format on.

Depends on data.py, programs.py, said.py, scoring.py.   Try it:  python -m pytest tests/test_benchmarks.py -q
"""

import ast
import builtins
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.data import Example
from tasks.programs import defined, parse_python
from tasks.said import LETTERS, as_number
from tasks.scoring import json_calls, react_calls, same

CHOICE = """{question}

{options}

Reason first. Then end with one line that holds the letter of your choice ({letters}) and nothing else:
Answer: ..."""
NUMBER = """{question}

Work it out step by step. Then end with one line that holds the result, a number, and nothing else:
#### ..."""
CODE = """Write Python code for this task.

{task}

It must define:
{signatures}

It will be tested by statements like these:
{tests}

Reply with the whole solution, imports included, in one ```python code fence."""
COMPLETE = """Complete this Python function.

{code}

Reply with the whole function, imports included, in one ```python code fence."""
TOOLS = """

If several calls are needed, write a Thought, an Action and an Action Input for each. Do not write what the tools return."""
REACT = """

Answer with lines of this form:
Thought: <why this call>
Action: <the name of a tool>
Action Input: <its arguments as a JSON object>"""
HELD_BACK = 1  # asserts that are scored but not shown, where there are more: tests that are all known can be met one by one


class Skip(Exception):
    """This record cannot be used; the message says why."""


@dataclass(frozen=True)
class Benchmark:
    """A data set on the hub. `ood` names the one that its models are also tested on, as out of distribution."""

    name: str
    hub: str
    convert: Callable[[str, dict, random.Random], Example]
    config: str | None = None
    test: str = "test"
    test_config: str | None = None  # where the test split is in another config
    evaluation_only: bool = False
    ood: str = ""

    def to_example(self, row: dict, index: int, seed: int) -> Example:
        """The Example made of the record at `index`; the seed only shuffles options, each record's in its own way. Raises Skip."""
        return self.convert(self.name, row, random.Random(f"{seed}-{index}"))


def unix(value: Any) -> str:
    """The text without carriage returns and outer blanks; "" for what is none."""
    return value.replace("\r\n", "\n").replace("\r", "\n").strip() if isinstance(value, str) else ""


def field(row: dict, name: str, needed: bool = True) -> str:
    """A field's text without carriage returns and outer blanks. Raises Skip if it is needed and empty."""
    text = unix(row.get(name))
    if needed and not text:
        raise Skip(f"no {name}")
    return text


def paragraphs(*parts: str) -> str:
    """The parts that are not empty, a blank line between them."""
    return "\n\n".join(part for part in parts if part)


# --- multiple choice -------------------------------------------------------------------------------------------------
def choice_example(name: str, question: str, options: Sequence[str], right: int | None, why: str, rng=None) -> Example:
    """The reference: why it is right, if known, and the answer line. `rng`, a Random, shuffles the options. May raise Skip."""
    if right not in range(len(options)):
        raise Skip("no answer")
    options = [unix(option) for option in options]
    if not 2 <= len(options) <= len(LETTERS) or not all(options):
        raise Skip("an option is empty, or there are fewer than two")
    if [" ".join(option.split()) for option in options].count(" ".join(options[right].split())) > 1:
        raise Skip("the right option stands there twice")  # case counts: of genes, FF is not ff
    if rng:
        order = rng.sample(range(len(options)), len(options))
        options, right = [options[i] for i in order], order.index(right)
    letters = LETTERS[: len(options)]
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    asked = CHOICE.format(question=question, options=listed, letters=f"{', '.join(letters[:-1])} or {letters[-1]}")
    answer = {"kind": "choice", "letter": letters[right], "options": options}
    return Example(name, asked, paragraphs(why, f"Answer: {letters[right]}"), answer)


def scienceqa(name: str, row: dict, rng: random.Random) -> Example:
    """Lecture and hint are read first; the hint is often the very passage that is asked about. Raises Skip, as all below."""
    if row.get("image") is not None:
        raise Skip("has an image")
    lecture, hint = field(row, "lecture", needed=False), field(row, "hint", needed=False)
    before = f"Lecture: {lecture}" if lecture else "", f"Context: {hint}" if hint else ""
    question, why = paragraphs(*before, f"Question: {field(row, 'question')}"), field(row, "solution", needed=False)
    return choice_example(name, question, row.get("choices") or [], row.get("answer"), why, rng)


def gpqa(name: str, row: dict, rng: random.Random) -> Example:
    """The right answer has a column of its own, so the options must be shuffled."""
    options = [field(row, column) for column in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))]
    return choice_example(name, f"Question: {field(row, 'Question')}", options, 0, field(row, "Explanation", needed=False), rng)


def cos_e(name: str, row: dict, rng: random.Random) -> Example:
    """The answer is the text of a choice."""
    choices, right = [unix(choice) for choice in row.get("choices") or []], field(row, "answer", needed=False)
    if right not in choices:
        raise Skip("the answer is not among the choices")
    why = field(row, "abstractive_explanation", needed=False)
    return choice_example(name, f"Question: {field(row, 'question')}", choices, choices.index(right), why)


def medmcqa(name: str, row: dict, rng: random.Random) -> Example:
    """Not shuffled: the explanations name options by their letters."""
    if row.get("cop") not in (0, 1, 2, 3):  # -1 in the hidden test split
        raise Skip("no answer")
    options = [field(row, column) for column in ("opa", "opb", "opc", "opd")]
    return choice_example(name, f"Question: {field(row, 'question')}", options, row.get("cop"), field(row, "exp", needed=False))


# --- numbers, tools --------------------------------------------------------------------------------------------------
def gsm8k(name: str, row: dict, rng: random.Random) -> Example:
    """The working and the result, without the calculator's notes in between."""
    working, _, result = field(row, "answer").rpartition("####")
    number = as_number(result)
    if number is None:
        raise Skip("no number after ####")
    reference = f"{re.sub(r'<<[^>]*>>', '', working).strip()}\n#### {number:f}".strip()
    answer = {"kind": "number", "value": f"{number:f}", "mark": "####"}
    return Example(name, NUMBER.format(question=field(row, "question")), reference, answer)


def toolalpaca(name: str, row: dict, rng: random.Random) -> Example:
    """The prompt has the documentation and the ReAct format. The reference: golden_response, if it makes exactly the gold calls."""
    prompt, instruction = field(row, "prompt"), field(row, "instruction", needed=False)
    written = row.get("golden_response") or []
    written = "\n".join(filter(None, map(unix, [written] if isinstance(written, str) else written)))
    try:
        calls = gold_calls(row.get("golden_answer") or []) or calls_in(written)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        calls = []
    if not calls or any(call["arguments"] is None for call in calls):
        raise Skip("no gold call, or its input is not a JSON object")
    bare = "\n".join(f"Action: {call['action']}\nAction Input: {json.dumps(call['arguments'])}" for call in calls)
    documented = re.findall(r"(?:^|\n|Documentation:)[ \t]*([A-Za-z_][\w.-]*):[^\n]*\nParameters:", prompt)
    called = {call["action"] for call in calls}
    others = [action for action in dict.fromkeys(documented) if action not in called]
    question = prompt + (f"\nQuestion: {instruction}" if instruction not in prompt else "")
    question += (REACT if "Action Input" not in prompt else "") + TOOLS
    reference = written if same(calls_in(written), calls) else bare
    return Example(name, question, reference, {"kind": "tools", "calls": calls, "actions": others})


def gold_calls(golden: Any) -> list[dict]:
    """The calls of a golden_answer: a list of records, one record, a record of lists (some versions of `datasets` make that of a
    list), or any of these as JSON text. No input is {}. Raises what json_calls does, or ValueError, if it is none of these.
    """
    golden = json.loads(golden) if isinstance(golden, str) else golden
    if isinstance(golden, dict) and all(isinstance(column, list) for column in golden.values()):
        golden = [dict(zip(golden, values, strict=True)) for values in zip(*golden.values(), strict=True)]
    records = [golden] if isinstance(golden, dict) else golden
    return json_calls([record | {"Action_Input": record.get("Action_Input") or {}} for record in records])


def calls_in(text: str) -> list[dict]:
    """[{"action", "arguments" (None: not a JSON object)}], in order."""
    return [{"action": call["action"], "arguments": call["arguments"]} for call in react_calls(text)]


# --- code ------------------------------------------------------------------------------------------------------------
def code_example(name: str, task: str, gold: str, tests: Sequence[str], setup: Sequence[str] = ()) -> Example:
    """An answer must define what the tests use of the gold code. `setup` runs first and is shown. Raises Skip if they use none."""
    tree, tested, prepared = (parse_python("\n".join(part)) for part in ([gold], tests, setup))
    if not tree or not tested or not tested.body or not prepared:
        raise Skip("no tests, or the gold code or its tests are not Python")
    symbols = {name: node for name, node in defined(tree).items() if not isinstance(node, ast.Import | ast.ImportFrom)}
    place = lambda node: (node.lineno, node.col_offset)  # in the order in which they stand
    names = [sorted((n for n in ast.walk(part) if isinstance(n, ast.Name)), key=place) for part in (tested, prepared)]
    used = [node.id for part in names for node in part if node.id in symbols]
    if not used:
        raise Skip("the tests use nothing that the gold code defines")
    functions = [symbol for symbol in used if isinstance(symbols[symbol], ast.FunctionDef | ast.AsyncFunctionDef)]
    entry = ([name for name in functions if not hasattr(builtins, name)] or functions[-1:] or used)[0]
    used = [name for name in used if name == entry or not hasattr(builtins, name)]  # tests mean Python's own `abs`
    imports = [ast.unparse(node) for node in prepared.body if isinstance(node, ast.Import | ast.ImportFrom)]
    signatures = "\n".join(signature(symbol, symbols[symbol]) for symbol in dict.fromkeys(used))
    question = CODE.format(task=task, signatures=signatures, tests="\n".join([*setup, *(tests[:-HELD_BACK] or tests)]))
    answer = {"kind": "code", "entry": entry, "tests": [*setup, *tests]}
    answer["prelude"] = "\n".join(imports)  # an answer may count on the setup's imports
    return Example(name, question, f"```python\n{gold}\n```", answer)


def signature(name: str, node: ast.stmt) -> str:
    """The first line of a definition; of a class also that of its __init__."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return next(line for line in ast.unparse(node).split("\n") if re.match(r"(async )?def ", line))  # decorators come before
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return "\n    ".join([f"class {name}:", *(signature("__init__", init) for init in inits)])
    return f"{name} = ..."


def mbpp(name: str, row: dict, rng: random.Random) -> Example:
    """The full set has text and test_setup_code, the sanitized one prompt and test_imports."""
    task = field(row, "prompt", needed=False) or field(row, "text")
    setup = [*map(unix, row.get("test_imports") or []), field(row, "test_setup_code", needed=False)]
    tests = [unix(test) for test in row.get("test_list") or [] if test.strip()]
    return code_example(name, task, field(row, "code"), tests, [line for line in setup if line])


def humaneval(name: str, row: dict, rng: random.Random) -> Example:
    """The prompt is the start of a program. What stands before the wanted function is there for answers, and once more for tests:
    they mean the prompt's own helpers, whatever an answer calls so.
    """
    columns = ("prompt", "canonical_solution", "entry_point")
    prompt, body, entry = ((row.get(column) or "").replace("\r\n", "\n") for column in columns)
    tree = parse_python(prompt + body)
    found = [node for node in tree.body if entry in defined(ast.Module([node], []))] if tree and body.strip() else []
    if not found:
        raise Skip("no entry point or no solution")
    first = min([found[-1].lineno, *(node.lineno for node in getattr(found[-1], "decorator_list", []))])
    before = "\n".join(prompt.split("\n")[: first - 1]).strip()
    question, reference = (f"```python\n{code.strip()}\n```" for code in (prompt, prompt + body))
    tests = [test for test in (before, field(row, "test"), f"check({entry})") if test]
    answer = {"kind": "code", "entry": entry, "tests": tests, "prelude": before}
    return Example(name, COMPLETE.format(code=question), reference, answer)


_GPQA = dict(hub="Idavidrein/gpqa", convert=gpqa, test="train", evaluation_only=True)
_MBPP = dict(hub="google-research-datasets/mbpp", convert=mbpp, ood="humaneval")
_ALL = (
    Benchmark("scienceqa", "derek-thomas/ScienceQA", scienceqa, ood="gpqa"),
    Benchmark("gpqa", config="gpqa_main", **_GPQA),
    Benchmark("gpqa-diamond", config="gpqa_diamond", **_GPQA),
    Benchmark("gpqa-extended", config="gpqa_extended", **_GPQA),
    Benchmark("cos_e", "Salesforce/cos_e", cos_e, config="v1.11", test="validation"),
    Benchmark("mbpp", config="full", test_config="sanitized", **_MBPP),  # scored on the sanitized test, as in the paper
    Benchmark("mbpp-sanitized", config="sanitized", **_MBPP),
    Benchmark("humaneval", "openai/openai_humaneval", humaneval, evaluation_only=True),
    Benchmark("toolalpaca", "Ahren09/ToolAlpaca", toolalpaca),
    Benchmark("medmcqa", "openlifescienceai/medmcqa", medmcqa, test="validation"),
    Benchmark("gsm8k", "openai/gsm8k", gsm8k, config="main"),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
