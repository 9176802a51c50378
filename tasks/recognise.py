"""recognise.py - what is known of a question that someone types: its reference, where the tiny world or a file has one.

A question of the tiny world holds all that its answer needs. The makers in world.py turn random draws into a question and its
references; here they get loaded dice, so that what they make is the very question that was typed, and no rule stands twice.

Depends on world.py, data.py.   Try it:  python -m pytest tests/test_explain.py -q
"""

import random
import re
from dataclasses import replace

from tasks import world
from tasks.data import Example, Task


class LoadedDice(random.Random):
    """Dice that fall as `told` says, from its start, and then freely."""

    def randint(self, low, high):
        return self.told.pop(0) if self.told else super().randint(low, high)

    def choice(self, pool):
        return self.told.pop(0) if self.told else super().choice(pool)

    def sample(self, pool, k):
        return self.told.pop(0) if self.told else super().sample(pool, k)


def recognise(question: str) -> Example | None:
    """A question of the tiny world -> its example, reference and wrong reference without blots; None if it is none."""
    words, pieces = re.findall(r"[a-z]+", question), lambda text: sorted(re.findall(r"\w+|\S", text))
    dice = LoadedDice(question)  # the free falls are seeded: the same wrong reference whenever one asks
    try:
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        match words:  # the draws of each maker, in its order
            case []:
                family, dice.told = "sum", [*numbers]
            case ["largest"] if len(set(numbers)) == 3:
                family, dice.told = "choice", [1, numbers]
            case ["where", "is", thing, *places] if len(set(places)) in (4, 6):
                family, dice.told = "fact", [thing, [p for p in places if p != world.HOMES[thing]]]
            case ["f", *steps] if len(numbers) in (2, 3):
                family, dice.told = "code", [w for w in steps if w != "then"] + numbers
            case ["tool", *asked]:
                asks = [w for ways, _ in world.TOOLS.values() for w in ways]
                draws = [next(w for w in asked if w in pool) for pool in (asks, world.CITIES, world.DAYS)]
                family, dice.told = "tool", draws + [str(n) for n in numbers]
            case _:
                return None
        harder = {"fact": len(words) == 9, "code": len(numbers) == 3, "tool": len(words) > len(set(words))}.get(family, False)
        item = world.MAKE[family](dice, ood=harder, scramble=False)
    except (LookupError, ValueError, StopIteration):  # a word that no maker uses, or too few
        return None
    # Places, and the arguments of a tool, come in any order.
    same = item.question == question or (family in ("fact", "tool") and pieces(item.question) == pieces(question))
    return Example(family, question, item.terse, item.answer, item.wrong) if same else None


def example_of(question: str, task: Task | None) -> Example | None:
    """The example behind a question: a training example or a line of a file, else the tiny world's; None if nobody knows it."""
    same = lambda e: question in (e.question, *e.question.split("\n\n")) or e.question.startswith(question + "\n")  # + its format
    tiny = bool(task) and task.name == "tiny"
    pool = [*task.train, *(() if tiny else task.test)] if task else []
    return next(filter(same, pool), None) or (recognise(question) if tiny else None)


def example_for(question: str, reference: str | None, wrong: str | None, task: Task | None) -> Example:
    """The same, with what was given by hand on top. Raises ValueError if there is no reference."""
    known = example_of(question, task)
    if not (known or reference):
        whose = f"{question[:60]!r} is no question of {task.name}" if task else "only you know the solution"
        more = " (explain.py --help shows some)" if task and task.name == "tiny" else ""
        raise ValueError(f"{whose}{more}: --reference is needed, a solution that the teacher sees and the student does not")
    known = known or Example("new", question, reference)
    return replace(known, reference=reference or known.reference, negative=known.negative if wrong is None else wrong)
