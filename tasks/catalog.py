"""catalog.py - a name -> a Task: the tiny world, a benchmark of the hub, real function calls, or a file of your own.

It exists so that training and evaluation mean the same questions by the same name.
A new task needs a line here, questions (`data.Example`) and a scorer; docs/exercises.md adds a family to the tiny world.

Depends on data.py, world.py, benchmarks.py, bfcl.py, jsonl.py.   Try it:  python -m pytest tests/test_data.py -q
"""

from tasks import benchmarks, bfcl, jsonl, world
from tasks.data import Task


def load_task(name: str, *, train_size: int | None = 0, test_size: int = 0, seed: int = 0, **tiny) -> tuple[Task, dict]:
    """-> (Task, the manifest of what was read, kept and dropped; empty for the tiny world).
    Sizes of 0 mean all; train_size None: only evaluate. In the tiny world, which has no end, test_size counts questions per family;
    for `tiny` see world.load. Raises ValueError, with the fix, if there is no such task or it cannot be loaded.
    """
    if name == "tiny":
        return world.load(5 if train_size is None else train_size, test_size or 100, seed=seed, **tiny), {}
    # Negatives are made whether the recipe needs them or not: the data and its fingerprint are the same for every recipe.
    settings = dict(test_size=test_size, seed=seed, negatives=train_size is not None, **tiny)  # of `tiny`, others know nothing
    if jsonl.is_file(name):
        return jsonl.load_jsonl(name, train_size=train_size or 0, **settings)
    if name == "bfcl":
        return bfcl.load(train_size=train_size, **settings)
    return benchmarks.load_task(name, train_size=train_size, **settings)
