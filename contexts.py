"""contexts.py - what else the teacher may see: K contexts of solved examples, for the agreement weights (eq. 2).

What: context k of a question = `demos` solved examples of *other* questions of the same task, then the question, with
its reference. The same answer is read under all K of them; where they differ, it is the demonstrations that differ,
never the task or the information about it.

Depends on data.py.   Try it:  python -m pytest tests/test_contexts.py -q
"""

import random

from data import Example


def random_demos(pool: list[Example], index: int, contexts: int, demos: int, seed: int) -> list[list[Example]]:
    """K lists of `demos` other examples of pool[index]'s task; the same for the same seed, whatever the order in which
    they are asked for.

    The question itself and exact duplicates of it are excluded: their answer would be the answer.
    Raises ValueError if the pool has too few other examples.
    """
    own = pool[index]
    r = random.Random(f"{seed}-{index}")
    others = [e for e in pool if e.task == own.task and e.question != own.question]
    if len(others) < demos:
        raise ValueError(
            f"--demos {demos}: only {len(others)} other examples of task {own.task!r} to show; lower it, or add data"
        )
    return [r.sample(others, demos) for _ in range(contexts)]
