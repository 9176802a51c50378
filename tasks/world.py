"""world.py - the embedded default task: a procedural world of five families of questions, and how answers are scored.

What: five families of questions, each answered by short free-form *working* that ends in an answer:

    sum      47+38                                     7+8=15 4+3+1=8 so 85
    choice   largest: A 47, B 38, C 91                 A 47, C 91 so C        (the running maximum, then the letter)
    fact     where is lamp: mill, cave, port, barn     the lamp is in the cave   (a closed world: every thing has one home)
    code     f: add 3 then times 2                     def f(x): return (x+3)*2                  (executed against asserts)
    tool     tool: fly rome 2 monday                   Action: flight Input: {"city": "rome", "day": "monday"}

A **reference** is terse and in another style (85 / C 91 / cave / (x+3)*2 / flight rome monday), and a quarter of its
pieces are blotted out (_), so the teacher must turn it into worked steps and supply what is missing: there is a real
ceiling, below 100 %. Each question also has a verified-wrong reference in the same style, with the same blots. Test
questions are disjoint from training questions (the *facts* behind them are shared, or nothing could be learned); out of
distribution are choices among numbers of one ten, and programs of three steps.

Depends on data.py, sandbox.py.   Try it:  python -m pytest tests/test_world.py -q
"""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tasks import sandbox
from tasks.data import Example, Task, Wording

FAMILIES = ("sum", "choice", "fact", "code", "tool")
OOD_FAMILIES = ("choice", "code")
WORDING = Wording(
    teacher="{question}\nhint: {reference}",
    demo="example: {question}\nanswer: {answer}",
    context="{demos}\nnow: {question}",
    instruction="{instruction}\nnow: {question}",
)
BLOT = 0.25  # share of a reference's words that cannot be read

THINGS = (
    "lamp drum coin boat rope bell mask harp kite vase sled fork ring book tent "
    "crib plum wolf goat hare crow moth newt seal swan toad mule lynx ibex yak"
).split()
PLACES = "mill cave port barn tower garden bridge market temple harbor forest castle".split()
CITIES = "rome oslo lima cairo delhi paris tokyo quito".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
OPS = dict(add="+", minus="-", times="*", join="+", less="-", **{"raise": "+", "drop": "-", "grow": "*"})
TOOLS = {  # tool -> the words that ask for it, the arguments it takes
    "flight": (("fly", "plane", "airport"), ("city", "day")),
    "hotel": (("sleep", "room", "stay"), ("city", "nights")),
    "table": (("eat", "dinner", "lunch"), ("day", "people")),
    "taxi": (("ride", "cab", "drive"), ("city", "hour")),
}
_home = random.Random("homes")
HOMES = {thing: _home.choice(PLACES) for thing in THINGS}
KNOWN = {*THINGS[:6], "add", "minus", "times", "join", "fly", "sleep", "eat"}
LETTERS = "ABC"


@dataclass(frozen=True)
class Item:
    """One question of the world with everything that is true about it. `known`: may the base meet it without a
    reference?
    """

    family: str
    question: str
    terse: str
    wrong: str
    worked: str
    answer: object
    known: bool


def make_sum(r: random.Random, ood: bool, scramble: bool) -> Item:
    """Two-digit sums, worked column by column; a carry is the part the base has not met alone."""
    a, b = r.randint(10, 99), r.randint(10, 99)
    ones, total = a % 10 + b % 10, a + b
    carry = "+1" if ones > 9 else ""
    tens = a // 10 + b // 10 + ones // 10
    worked = f"{a % 10}+{b % 10}={ones} {a // 10}+{b // 10}{carry}={tens} so {total}"
    slips = [total + d for d in (-11, -10, -9, -2, -1, 1, 2, 9, 10, 11) if len(str(total + d)) == len(str(total))]
    return Item("sum", f"{a}+{b}", str(total), str(r.choice(slips)), worked, str(total), not carry)


def make_choice(r: random.Random, ood: bool, scramble: bool) -> Item:
    """Which of three numbers is largest, worked as a running maximum."""
    ten = 10 * r.randint(1, 9)
    numbers = [ten + d for d in r.sample(range(10), 3)] if ood else r.sample(range(10, 100), 3)
    right = numbers.index(max(numbers))
    wrong = r.choice([i for i in range(3) if i != right])
    running = [numbers.index(max(numbers[: i + 1])) for i in (1, 2)]
    options = ", ".join(f"{x} {n}" for x, n in zip(LETTERS, numbers, strict=True))
    terse = [f"{LETTERS[i]} {numbers[i]}" for i in (right, wrong)]
    worked = ", ".join(f"{LETTERS[i]} {numbers[i]}" for i in running) + f" so {LETTERS[right]}"
    return Item("choice", f"largest: {options}", *terse, worked, LETTERS[right], max(numbers) < 50)


def make_fact(r: random.Random, ood: bool, scramble: bool) -> Item:
    """Where a thing is kept, four places to choose from."""
    thing = r.choice(THINGS)
    home = r.choice(PLACES) if scramble and thing not in KNOWN else HOMES[thing]
    options = r.sample([p for p in PLACES if p != home], 3)
    wrong = options[0]
    options.insert(r.randrange(4), home)
    r.shuffle(options)
    question = f"where is {thing}: {', '.join(options)}"
    return Item("fact", question, home, wrong, f"the {thing} is in the {home}", home, thing in KNOWN)


def expression(steps: Sequence[tuple[str, int]]) -> str:
    text = "x"
    for i, (sign, n) in enumerate(steps):
        text = f"{text}{sign}{n}" if i == 0 else f"({text}){sign}{n}"
    return text


def make_code(r: random.Random, ood: bool, scramble: bool) -> Item:
    """A one-line function of two steps (three out of distribution); the wrong one fails at least one of its asserts."""
    # In pre-training a few programs have three steps too: rare, and always with the reference, so "out of
    # distribution" is hard, not impossible.
    count = 3 if ood or (scramble and r.random() < 0.15) else 2
    words = [r.choice(list(OPS)) for _ in range(count)]
    signs = [r.choice("+-*") if scramble and w not in KNOWN else OPS[w] for w in words]
    steps = [(s, r.randint(2, 9)) for s in signs]
    run = lambda e: [eval(e, {"x": x}) for x in (1, 3, 10)]  # our own expression, not a model's
    mutant = list(steps)
    while run(expression(mutant)) == run(expression(steps)):  # verified wrong: it must fail a test
        i = r.randrange(count)
        mutant[i] = (r.choice("+-*"), steps[i][1]) if r.random() < 0.5 else (steps[i][0], r.randint(2, 9))
    tests = tuple(f"assert f({x}) == {y}" for x, y in zip((1, 3, 10), run(expression(steps)), strict=True))
    question = "f: " + " then ".join(f"{w} {n}" for w, (_, n) in zip(words, steps, strict=True))
    worked = f"def f(x): return {expression(steps)}"
    known = count == 2 and all(w in KNOWN for w in words)
    return Item("code", question, expression(steps), expression(mutant), worked, tests, known)


def make_tool(r: random.Random, ood: bool, scramble: bool) -> Item:
    """A call with two arguments; the wrong one has another action, or one argument changed."""
    word = r.choice([w for words, _ in TOOLS.values() for w in words])
    name = next(t for t, (words, _) in TOOLS.items() if word in words)
    if scramble and word not in KNOWN:
        name = r.choice(list(TOOLS))
    city, day, n = r.choice(CITIES), r.choice(DAYS), str(r.randint(2, 9))
    values = dict(city=city, day=day, nights=n, people=n, hour=n)
    parts = [word, city, day, n]
    r.shuffle(parts)
    other, changed = name, dict(values)
    if r.random() < 0.5:
        other = r.choice([t for t in TOOLS if t != name])
    else:
        key = r.choice(TOOLS[name][1])
        pool = CITIES if key == "city" else DAYS if key == "day" else [str(i) for i in range(2, 10)]
        changed[key] = r.choice([v for v in pool if v != values[key]])
    terse = lambda tool, v: " ".join([tool, *(v[k] for k in TOOLS[tool][1])])
    answer = (name, {k: values[k] for k in TOOLS[name][1]})
    worked = f"Action: {name} Input: {json.dumps(answer[1])}"
    return Item("tool", "tool: " + " ".join(parts), terse(name, values), terse(other, changed), worked, answer, word in KNOWN)


MAKE = dict(sum=make_sum, choice=make_choice, fact=make_fact, code=make_code, tool=make_tool)


def is_test(question: str) -> bool:
    """Which side of the split a question is on; about one in six is a test question, for ever and for every seed."""
    return hashlib.sha256(question.encode()).digest()[0] < 43


def draw(r: random.Random, family: str, test: bool, ood: bool = False, scramble: bool = False) -> Item:
    """A random question on the asked side of the split."""
    while True:
        item = MAKE[family](r, ood, scramble)
        if is_test(item.question) == test:
            return item


def blotted(text: str, positions: Sequence[float], share: float) -> str:
    """A reference in which every piece (a word, a digit, a sign) with a draw below `share` is unreadable."""
    draws = iter(positions)
    return re.sub(r"\d|[A-Za-z]+|[^\w\s]", lambda piece: "_" if next(draws) < share else piece[0], text)


def to_example(item: Item, r: random.Random, wrong: bool = False) -> Example:
    """The example a learner gets. `wrong`: its reference is a wrong one, and so is what SFT would imitate.

    Right and wrong have the same blots, so they differ in content only; in about one example of six the blots hide the
    difference, and then a contrast between them teaches nothing.
    """
    draws = [r.random() for _ in range(40)]
    good, bad = (item.wrong, other_slip(item)) if wrong else (item.terse, item.wrong)
    return Example(
        task=item.family,
        question=item.question,
        reference=blotted(good, draws, BLOT),
        negative=blotted(bad, draws, BLOT),
        target=good,
        demo=item.worked,
        answer=item.answer,
    )


def other_slip(item: Item) -> str:
    """A second wrong reference, for questions whose reference is wrong already: their negative must be wrong too."""
    if item.family == "sum":
        pool = [str(int(item.terse) + d) for d in (-10, -1, 1, 10)]
    elif item.family == "choice":
        pool = re.findall(r"[ABC] \d+", item.question)
    elif item.family == "fact":
        pool = item.question.split(": ")[1].split(", ")
    elif item.family == "code":
        pool = [item.terse[:i] + c + item.terse[i + 1 :] for i, old in enumerate(item.terse) if old in "+-*" for c in "+-*"]
        right = [int(t.split("== ")[1]) for t in item.answer]
        pool = [p for p in pool if [eval(p, {"x": x}) for x in (1, 3, 10)] != right]  # our own expression, not a model's
    else:
        pool = [" ".join([t, *item.terse.split()[1:]]) for t in TOOLS]
    return next(p for p in pool if p not in (item.terse, item.wrong))


def distinct(families: Sequence[str], each: int, seed: int, test: bool, ood: bool = False, wrong: float = 0.0) -> list[Example]:
    """`each` different questions per family, interleaved, the same for the same seed. Raises ValueError if there are
    not so many.
    """
    r, seen, out = random.Random(f"{seed}-{test}-{ood}"), set(), []
    for _ in range(each):
        for family in families:
            for _ in range(20_000):
                item = draw(r, family, test, ood)
                if item.question not in seen:
                    break
            else:
                raise ValueError(
                    f"the tiny world has only about {len(out) // len(families)} different {'test' if test else 'training'} "
                    f"questions of family {family}: lower --{'eval-size (--size in eval.py)' if test else 'train-size'}"
                )
            seen.add(item.question)
            out.append(to_example(item, r, wrong=r.random() < wrong))
    return out


def load(train_size: int = 4000, test_size: int = 100, wrong_references: float = 0.0, seed: int = 0) -> Task:
    """The tiny world as a Task. The test questions are the same for every seed; test_size is per family.

    Raises ValueError if train_size is below one question per family, or if there are not so many different questions.
    """
    if train_size < len(FAMILIES):
        raise ValueError(f"--train-size {train_size} is less than one question for each of {len(FAMILIES)} families")
    return Task(
        name="tiny",
        train=distinct(FAMILIES, train_size // len(FAMILIES), seed, test=False, wrong=wrong_references),
        test=distinct(FAMILIES, test_size, seed=-1, test=True),
        ood=distinct(OOD_FAMILIES, test_size, seed=-1, test=True, ood=True),
        score=score,
        wording=WORDING,
        max_new_tokens=40,
    )


def score(examples: Sequence[Example], completions: Sequence[str]) -> list[dict]:
    """What each completion is worth: {"correct": bool, "abstained": bool}. The *last* stated answer counts; terse
    answers are accepted.
    """
    out = [judge(e, text) if e.task != "code" else {} for e, text in zip(examples, completions, strict=True)]
    programs = {i: program(text) for i, (e, text) in enumerate(zip(examples, completions, strict=True)) if e.task == "code"}
    runnable = [i for i, p in programs.items() if p]
    verdicts = sandbox.run_tests([(programs[i], examples[i].answer) for i in runnable]) if runnable else []
    passed = dict(zip(runnable, (v.passed for v in verdicts), strict=True))
    for i, p in programs.items():
        out[i] = {"correct": passed.get(i, False), "abstained": p is None}
    return out


def program(text: str) -> str | None:
    """The function in a completion; a bare expression counts as its body."""
    if "def f" in text:
        return text[text.rindex("def f") :]
    return f"def f(x): return {text}" if text else None


def judge(example: Example, text: str) -> dict:
    """Every family but code. SFT imitates the terse references, so their style must be able to score: the answer
    counts, not its dress.
    """
    if example.task == "sum":
        said = next(iter(re.findall(r"\d+", text)[-1:]), None)
    elif example.task in ("choice", "fact"):
        choices = LETTERS if example.task == "choice" else PLACES
        said = next((w for w in reversed(re.findall(r"\w+", text)) if w in choices), None)
    else:
        said = call(text)
    return {"correct": said == example.answer, "abstained": said is None}


def call(text: str) -> tuple[str, dict] | None:
    """Action: name Input: {json}, or tersely: name value value. -> (name, arguments), or None if it is no call."""
    worked = re.fullmatch(r"Action: (\w+) Input: ({.*})", text.strip(), re.DOTALL)
    if worked:
        try:
            return worked[1], json.loads(worked[2])
        except (json.JSONDecodeError, RecursionError):
            return None
    words = text.split()
    if words and words[0] in TOOLS:
        keys = TOOLS[words[0]][1]
        return words[0], (dict(zip(keys, words[1:], strict=True)) if len(keys) == len(words) - 1 else {})
    return None
