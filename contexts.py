"""contexts.py - what else the teacher may see: K contexts of solved examples, for the agreement weights (eq. 2).

What: context k of a question = `demos` solved examples of *other* questions of the same task, then the question, with
its reference. The same answer is read under all K of them; where they differ, it is the demonstrations that differ,
never the task or the information about it.

Depends on data.py.   Try it:  python -m pytest tests/test_contexts.py -q
"""

import random

from data import Example, Task, chat_ids, context_message, fit_prompt, teacher_message


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


def encode(tokenizer, task: Task, i: int, cfg) -> dict:
    """The token ids of every prompt of training example i that the settings need; what is off is not built.

    -> {"student": ids, "teacher": ids, "negative": ids, "contexts": K ids}. Raises ValueError if a question is too
    long.
    """
    e, words, limit = task.train[i], task.wording, cfg.max_prompt_tokens

    def with_reference(reference: str) -> list[int]:
        return fit_prompt(tokenizer, lambda r: teacher_message(words, e.question, r), reference, limit)[0]

    student, _ = fit_prompt(tokenizer, lambda _: e.question, "", limit)
    shown = random_demos(task.train, i, cfg.contexts, cfg.demos, cfg.seed) if cfg.uses_agreement else []
    return {
        "student": student,
        "teacher": with_reference(e.reference) if cfg.uses_teacher else [],
        "negative": with_reference(e.negative) if cfg.w_contrast else [],
        "contexts": [chat_ids(tokenizer, context_message(words, e, demos, with_reference=True)) for demos in shown],
    }
