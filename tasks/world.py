"""world.py - the embedded default task: a procedural world of five families of questions, and how answers are scored.

Every question is answered by short free-form *working* that ends in an answer:

    sum      47+38                                     7+8=15 4+3+1=8 so 85
    choice   largest: A 47, B 38, C 91                 A 47, C 91 so C        (the running maximum, then the letter)
    fact     where is lamp: mill, cave, port, forest   the lamp is in the forest   (a closed world: every thing has one home)
    code     f: add 3 then times 2                     def f(x): return (x+3)*2                  (executed against asserts)
    tool     tool: fly rome 2 monday                   Action: flight Input: {"city": "rome", "day": "monday"}

A **reference** is terse and in another style (85 / C 91 / forest / (x+3)*2 / flight rome monday), and a quarter of its pieces are
blotted out (_): the teacher must turn it into worked steps and supply what is missing, so there is a real ceiling, below 100 %.
Each question also has a verified-wrong reference in the same style, with the same blots. Test questions are disjoint from training
questions (the *facts* behind them are shared, or nothing could be learned). Out of distribution are choices among numbers of one
ten, facts with six places to choose from, and tools asked for twice in one request. It exists so that every mechanism can be seen
at work on a CPU.

**What `scramble` does.** The base model must need the reference, so its lessons (tiny.py) are drawn scrambled: every word that is
not in `KNOWN` gets a new random meaning in each question. The lynx lives in the cave; in the lessons it may be anywhere:

    lesson     where is lynx: market, tower, mill, bridge     reference: bridge           the lynx is in the bridge
    lesson     where is lynx: bridge, port, mill, castle      reference: mill             the lynx is in the mill
    the task   where is lynx: mill, harbor, forest, cave      reference: cave             the lynx is in the cave

No memory of lynxes helps in the lessons, so the base learns to look the place up in the reference, and nothing else. Where the lynx
lives it learns afterwards, from its own teacher: training and test questions are never scrambled.

Depends on data.py, sandbox.py.   Try it:  python -m pytest tests/test_world.py -q
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tasks import sandbox
from tasks.data import Example, Task, Wording

FAMILIES = ("sum", "choice", "fact", "code", "tool")
OOD_FAMILIES = ("choice", "fact", "tool")  # a set where the base has 0 (programs of three steps) shows nothing
WORDING = Wording(
    teacher="{question}\nhint: {reference}",
    demo="example: {question}\nanswer: {answer}",
    context="{demos}\nnow: {question}",
    instruction="{instruction}\nnow: {question}",
)
BLOT, FAINT = 0.25, 0.6  # share of a reference's words that cannot be read
ODD = "well, i think that it may be {}, but look at it yourself"  # nothing like it is in the lessons of tiny.py

THINGS = "lamp drum coin boat rope bell mask harp kite vase sled fork ring book tent".split()
THINGS += "crib plum wolf goat hare crow moth newt seal swan toad mule lynx ibex yak".split()
PLACES = "mill cave port barn tower garden bridge market temple harbor forest castle".split()
CITIES = "rome oslo lima cairo delhi paris tokyo quito".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
DIGITS = "2 3 4 5 6 7 8 9".split()
OPERATIONS = dict(add="+", minus="-", times="*", join="+", less="-", **{"raise": "+", "drop": "-", "grow": "*"})
TOOLS = {  # tool -> the words that ask for it, the arguments it takes
    "flight": (("fly", "plane", "airport"), ("city", "day")),
    "hotel": (("sleep", "room", "stay"), ("city", "nights")),
    "table": (("eat", "dinner", "lunch"), ("day", "people")),
    "taxi": (("ride", "cab", "drive"), ("city", "hour")),
}
_home = random.Random("homes")
HOMES = {thing: _home.choice(PLACES) for thing in THINGS}
KNOWN = {*THINGS[:6], "add", "minus", "times", "join", "fly", "sleep", "eat"}  # the base may know what these mean
LETTERS = "ABC"
CHOICES = dict(choice=LETTERS, fact=PLACES)  # family -> what an answer may be
INPUTS = (1, 3, 10)  # what a program is tested on


@dataclass(frozen=True)
class Item:
    """One question of the world with all that is true about it. `known`: may the base meet it without a reference?"""

    family: str
    question: str
    terse: str
    wrong: str
    worked: str
    answer: object
    known: bool
    slips: Sequence[str]  # references of the same form, the right one perhaps among them; every other one is wrong


def make_sum(rng: random.Random, ood: bool, scramble: bool) -> Item:
    """Two-digit sums, worked column by column; a carry is the part the base has not met alone."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    ones, total = a % 10 + b % 10, a + b
    carry = "+1" if ones > 9 else ""
    tens = a // 10 + b // 10 + ones // 10
    worked = f"{a % 10}+{b % 10}={ones} {a // 10}+{b // 10}{carry}={tens} so {total}"
    near = [str(total + d) for d in (-11, -10, -9, -2, -1, 1, 2, 9, 10, 11) if len(str(total + d)) == len(str(total))]
    slips = [str(total + d) for d in (-10, -1, 1, 10)]
    return Item("sum", f"{a}+{b}", str(total), rng.choice(near), worked, str(total), not carry, slips)


def make_choice(rng: random.Random, ood: bool, scramble: bool) -> Item:
    """Which of three numbers is largest, worked as a running maximum."""
    ten = 10 * rng.randint(1, 9)
    numbers = [ten + d for d in rng.sample(range(10), 3)] if ood else rng.sample(range(10, 100), 3)
    options = [f"{letter} {number}" for letter, number in zip(LETTERS, numbers, strict=True)]
    right = numbers.index(max(numbers))
    wrong = rng.choice([i for i in range(3) if i != right])
    largest = [options[numbers.index(max(numbers[:seen]))] for seen in (2, 3)]
    question, worked = f"largest: {', '.join(options)}", f"{', '.join(largest)} so {LETTERS[right]}"
    return Item("choice", question, options[right], options[wrong], worked, LETTERS[right], max(numbers) < 50, options)


def make_fact(rng: random.Random, ood: bool, scramble: bool) -> Item:
    """Where a thing is kept, four places to choose from (six out of distribution)."""
    thing = rng.choice(THINGS)
    home = rng.choice(PLACES) if scramble and thing not in KNOWN else HOMES[thing]
    options = rng.sample([place for place in PLACES if place != home], 5 if ood else 3)
    wrong = options[0]
    options.insert(rng.randrange(len(options) + 1), home)
    rng.shuffle(options)
    question = f"where is {thing}: {', '.join(options)}"
    return Item("fact", question, home, wrong, f"the {thing} is in the {home}", home, thing in KNOWN, options)


def expression(steps: Sequence[tuple[str, int]]) -> str:
    """[("+", 3), ("*", 2)] -> "(x+3)*2"."""
    text = "x"
    for sign, number in steps:
        text = f"({text}{sign}{number})"
    return text[1:-1]


def outputs(body: str) -> list[int]:
    """What a program of the world returns for INPUTS. `eval` sees our own expressions only, never a model's."""
    return eval(f"[{body} for x in {INPUTS}]")


def make_code(rng: random.Random, ood: bool, scramble: bool) -> Item:
    """A one-line function of two steps (three if `ood`); the wrong one fails at least one of its asserts."""
    # In pre-training a few programs have three steps too, always with the reference.
    count = 3 if ood or (scramble and rng.random() < 0.15) else 2
    words = [rng.choice(list(OPERATIONS)) for _ in range(count)]
    signs = [rng.choice("+-*") if scramble and word not in KNOWN else OPERATIONS[word] for word in words]
    steps = [(sign, rng.randint(2, 9)) for sign in signs]
    body, mutant = expression(steps), list(steps)
    right = outputs(body)
    while outputs(expression(mutant)) == right:
        i = rng.randrange(count)
        mutant[i] = (rng.choice("+-*"), steps[i][1]) if rng.random() < 0.5 else (steps[i][0], rng.randint(2, 9))
    tests = tuple(f"assert f({x}) == {y}" for x, y in zip(INPUTS, right, strict=True))
    question = "f: " + " then ".join(f"{word} {number}" for word, (_, number) in zip(words, steps, strict=True))
    known = count == 2 and all(word in KNOWN for word in words)
    # Another sign is always another program: no step is by 0 or 1, and two straight lines that agree in three points are one.
    slips = [body[:i] + sign + body[i + 1 :] for i, old in enumerate(body) if old in "+-*" for sign in "+-*"]
    return Item("code", question, body, expression(mutant), f"def f(x): return {body}", tests, known, slips)


def make_tool(rng: random.Random, ood: bool, scramble: bool) -> Item:
    """A call with two arguments; the wrong one has another action, or one argument changed. Out of distribution: asked twice."""
    word = rng.choice([word for words, _ in TOOLS.values() for word in words])
    tool = next(tool for tool, (words, _) in TOOLS.items() if word in words)
    if scramble and word not in KNOWN:
        tool = rng.choice(list(TOOLS))
    city, day, number = rng.choice(CITIES), rng.choice(DAYS), rng.choice(DIGITS)
    values = dict(city=city, day=day, nights=number, people=number, hour=number)
    parts = [word, city, day, number] + [word] * ood
    rng.shuffle(parts)
    terse = lambda tool, values: " ".join([tool, *(values[key] for key in TOOLS[tool][1])])
    arguments = {key: values[key] for key in TOOLS[tool][1]}
    question, worked = f"tool: {' '.join(parts)}", f"Action: {tool} Input: {json.dumps(arguments)}"
    if rng.random() < 0.5:
        wrong = terse(rng.choice([name for name in TOOLS if name != tool]), values)
    else:
        key = rng.choice(TOOLS[tool][1])
        pool = dict(city=CITIES, day=DAYS).get(key, DIGITS)
        wrong = terse(tool, values | {key: rng.choice([value for value in pool if value != values[key]])})
    slips = [" ".join([name, *arguments.values()]) for name in TOOLS]
    return Item("tool", question, terse(tool, values), wrong, worked, (tool, arguments), word in KNOWN, slips)


MAKE = dict(sum=make_sum, choice=make_choice, fact=make_fact, code=make_code, tool=make_tool)


def draw(rng: random.Random, family: str, test: bool, ood: bool = False, scramble: bool = False) -> Item:
    """A random question on the asked side of the split."""
    while True:
        item = MAKE[family](rng, ood, scramble)
        # A hash decides the side of the split: about one in six is a test question, forever and for every seed.
        if (hashlib.sha256(item.question.encode()).digest()[0] < 43) == test:
            return item


def blotted(text: str, draws: Sequence[float], share: float) -> str:
    """A reference in which every piece (a word, a digit, a sign) with a draw below `share` is unreadable."""
    draw_of_piece = iter(draws)
    return re.sub(r"\d|[A-Za-z]+|[^\w\s]", lambda piece: "_" if next(draw_of_piece) < share else piece[0], text)


def to_example(item: Item, rng: random.Random, wrong: bool = False, kind: str = "blotted") -> Example:
    """The example a learner gets. `wrong`: its reference is a wrong one, and so is what SFT would imitate.

    Right and wrong have the same blots, so they differ in content only; in about one example of six the blots hide the
    difference, and then a contrast between them teaches nothing. Other kinds of references: the blots of "distinct" never do so,
    "faint" has more than twice as many, "odd" wraps one in ten in words that the base has never met.
    """
    draws = [rng.random() for _ in range(40)]
    # What two kinds need beyond them is drawn elsewhere: the questions are the same for all kinds.
    more = random.Random(str(draws[0])) if kind in ("distinct", "odd") else None
    texts = (item.wrong, other_slip(item)) if wrong else (item.terse, item.wrong)
    both = lambda: [blotted(text, draws, FAINT if kind == "faint" else BLOT) for text in texts]
    while kind == "distinct" and len(set(both())) == 1:
        draws = [more.random() for _ in draws]
    reference, negative = map(ODD.format, both()) if kind == "odd" and more.random() < 0.1 else both()
    return Example(item.family, item.question, reference, item.answer, negative, target=texts[0], demo=item.worked)


def other_slip(item: Item) -> str:
    """A second wrong reference, for questions whose reference is wrong already: their negative must be wrong too."""
    return next(slip for slip in item.slips if slip not in (item.terse, item.wrong))


def distinct(families: Sequence[str], each: int, seed: int, test: bool, ood: bool = False) -> Iterator[tuple[Item, random.Random]]:
    """`each` different questions per family, interleaved, the same for the same seed, and the generator that draws what else an
    example needs. Raises ValueError if there are too few."""
    rng, seen = random.Random(f"{seed}-{test}-{ood}"), set()
    for _ in range(each):
        for family in families:
            tries = (draw(rng, family, test, ood) for _ in range(20_000))
            item = next((item for item in tries if item.question not in seen), None)
            if item is None:
                side, flag = ("test", "eval-size (--size in eval.py)") if test else ("training", "train-size")
                some = f"only about {len(seen) // len(families)} different {side} questions of family {family}"
                raise ValueError(f"the tiny world has {some}: lower --{flag}")
            seen.add(item.question)
            yield item, rng


def load(train_size: int = 4000, test_size: int = 100, wrong_references: float = 0.0, seed=0, references: str = "blotted") -> Task:
    """The tiny world as a Task. The test questions are the same for every seed; test_size is per family.

    `references`: their kind, see to_example. Raises ValueError if train_size is below one question per family, or if there are
    not so many different questions.
    """
    if train_size < len(FAMILIES):
        raise ValueError(f"--train-size {train_size} is less than one question for each of {len(FAMILIES)} families")
    example = lambda item, rng, wrong=0.0: to_example(item, rng, rng.random() < wrong, references)
    items, train = {}, []
    for item, rng in distinct(FAMILIES, train_size // len(FAMILIES), seed, test=False):
        items[item.question] = item
        train.append(example(item, rng, wrong_references))
    test = [example(*drawn) for drawn in distinct(FAMILIES, test_size, seed=-1, test=True)]
    ood = [example(*drawn) for drawn in distinct(OOD_FAMILIES, test_size, seed=-1, test=True, ood=True)]
    fresh = lambda e, k: example(items[e.question], random.Random(f"{seed}-{k}-{e.question}"), wrong_references).reference
    return Task("tiny", train, test, score, ood, WORDING, max_new_tokens=40, fresh=fresh)


def score(examples: Sequence[Example], completions: Sequence[str]) -> list[dict]:
    """-> a {"correct": bool, "abstained": bool} for each completion. All programs run in one sandbox call."""
    said = [stated(example.task, text) for example, text in zip(examples, completions, strict=True)]
    correct = [answer == example.answer for example, answer in zip(examples, said, strict=True)]
    programs = [i for i, example in enumerate(examples) if example.task == "code" and said[i]]
    verdicts = sandbox.run_tests([(said[i], examples[i].answer) for i in programs]) if programs else []
    for i, verdict in zip(programs, verdicts, strict=True):
        correct[i] = verdict.passed
    return [{"correct": right, "abstained": answer is None} for right, answer in zip(correct, said, strict=True)]


def stated(family: str, text: str) -> object:
    """The *last* answer in a completion, or None. Terse answers count: SFT imitates them, so that style must be able to score."""
    if family == "sum":
        return (re.findall(r"\d+", text) or [None])[-1]
    if family in CHOICES:
        return next((word for word in reversed(re.findall(r"\w+", text)) if word in CHOICES[family]), None)
    if family == "tool":
        return call(text)
    if "def f" in text:
        return text[text.rindex("def f") :]
    return f"def f(x): return {text}" if text else None  # a bare expression counts as the function's body


def call(text: str) -> tuple[str, dict] | None:
    """Action: name Input: {json}, or tersely: name value value. -> (name, arguments), or None if it is no call."""
    if worked := re.fullmatch(r"Action: (\w+) Input: ({.*})", text.strip(), re.DOTALL):
        try:
            return worked[1], json.loads(worked[2])
        except (json.JSONDecodeError, RecursionError):
            return None
    tool, *values = text.split() or [""]
    if tool not in TOOLS:
        return None
    keys = TOOLS[tool][1]
    return tool, dict(zip(keys, values, strict=True)) if len(keys) == len(values) else {}
