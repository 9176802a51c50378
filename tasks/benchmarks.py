"""benchmarks.py - a data set of the paper, from the hub, -> a Task.

`load_task("scienceqa", train_size=2000, test_size=500)` draws records, converts them (records.py), adds proven negatives
(negatives.py), and says in the manifest what was read, kept, dropped and why. It exists so that runs can be compared: for a name
and a seed the examples and their order are the same, whatever the recipe, and the test examples are the same for every seed.
`datasets` is imported only when a data set of the hub is asked for, and code from the hub is never run.

Depends on data.py, records.py, scoring.py, negatives.py.   Try it:  python -m pytest tests/test_benchmarks.py -q
"""

import random
import warnings
from collections import Counter
from collections.abc import Sequence

from tasks.data import Example, Task
from tasks.negatives import add_negatives
from tasks.records import BENCHMARKS, Benchmark, Skip
from tasks.scoring import score_all


def load_task(name: str, *, train_size: int | None = 0, test_size=0, seed=0, negatives=True) -> tuple[Task, dict]:
    """A data set of BENCHMARKS, by name. Sizes of 0 mean all; train_size None: only evaluate, read no training data. Raises
    ValueError if there is no such data set, if it may not be trained on, or if it cannot be loaded.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"--data {name}: no such data set; there are {', '.join(BENCHMARKS)}, or give a .jsonl file")
    if (smallest := min(train_size or 0, test_size)) < 0:
        raise ValueError(f"a size of {smallest} is negative; 0 takes all there is")
    benchmark = BENCHMARKS[name]
    if benchmark.evaluation_only and train_size is not None:
        used_by = ", ".join(other.name for other in BENCHMARKS.values() if other.ood == name)
        advice = f"; train on {used_by}, which is also tested on it" if used_by else ""
        raise ValueError(f"--data {name} is for evaluation only, nothing may be trained on it{advice}")
    manifest = {"data": name, "hub": benchmark.hub, "config": benchmark.config, "seed": seed}
    train, ood = [], []
    if train_size is not None:
        train, manifest["train"] = draw(benchmark, "train", train_size, seed)
        if negatives:
            train, manifest["negatives"] = add_negatives(train, seed)
    test, manifest["test"] = draw(benchmark, "test", test_size, seed)
    if benchmark.ood:
        try:
            ood, manifest["ood"] = draw(BENCHMARKS[benchmark.ood], "test", test_size, seed)
        except ValueError as error:
            warnings.warn(f"no out-of-distribution test: {error}", stacklevel=2)
            manifest["ood"] = {"data": benchmark.ood, "error": str(error)}
    task = Task(name, train, test, score_all, ood)
    return task, manifest | {"fingerprint": task.fingerprint()}


def draw(benchmark: Benchmark, side: str, size: int, seed: int) -> tuple[list[Example], dict]:
    """`size` examples (0 = all) of the "train" or the "test" side, and what became of the records that were looked at. Training
    examples come in the order of a shuffle by the seed. Test examples are a draw that is the same for every seed, in the order of
    the data set. Raises ValueError if no record can be used.
    """
    seed = seed if side == "train" else 0  # of the options, too: a test question looks the same in every run
    rows = _rows(benchmark, side)
    kept, dropped = {}, Counter()
    for index in random.Random(f"{benchmark.name}-{side}-{seed}").sample(range(len(rows)), len(rows)):
        if size and len(kept) == size:
            break
        try:
            kept[index] = benchmark.to_example(rows[index], index, seed)
        except Skip as skip:
            dropped[str(skip)] += 1
    if not kept:
        raise ValueError(f"--data {benchmark.name}: no record of its {side} side can be used: {dict(dropped)}")
    read = len(kept) + dropped.total()
    count = {"data": benchmark.name, "rows": len(rows), "read": read, "kept": len(kept), "dropped": dict(dropped)}
    return [kept[index] for index in (kept if side == "train" else sorted(kept))], count


def _rows(benchmark: Benchmark, side: str) -> Sequence[dict]:
    """The raw records of the "train" or "test" side. Tests put their own in its place."""
    try:
        import datasets  # imported here, so that nothing else needs it
    except ImportError:
        raise ValueError(f"--data {benchmark.name} needs the datasets package: pip install datasets") from None
    of_test = benchmark.test, benchmark.test_config or benchmark.config
    split, config = of_test if side == "test" else ("train", benchmark.config)
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
    first_line = error.strip().partition("\n")[0]
    reason = f"{benchmark.hub} is not cached here and could not be fetched ({first_line})"
    return f"--data {benchmark.name}: {reason}; connect once, or use --data tiny or a .jsonl file"
