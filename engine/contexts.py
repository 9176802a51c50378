"""contexts.py - what else the teacher may see: K contexts for the agreement weights (eq. 2), and model-written
negatives.

What: context k of a question is the same task, seen through something else, with or without its own reference:

    random      solved examples of other questions of the same task, drawn at random
    retrieval   the most similar ones, by the model's own mean-pooled states, or by TF-IDF
    induction   a general instruction, which the model itself wrote after looking at solved examples

The same answer is read under all K of them; where the readings differ, it is the context that differs, never the task.
(Where a task has too few questions, as a small file of one's own may, examples of the other tasks fill up.)
What was made is kept in a file stamped with everything it depends on, and made again when any of that changes.

Depends on data.py, rollout.py, checkpoint.py.   Try it:  python -m pytest tests/test_contexts.py -q
"""

import hashlib
import json
import random
import re
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.checkpoint import write_json
from engine.rollout import Loaded, decode, generate, right_pad
from tasks.data import Example, Task, TooLong, chat_ids, context_message, fit_prompt, instruction_message, teacher_message

INDUCE = (
    "{demos}\n\nThe examples above are solved tasks of one kind. Write one general instruction of two or three sentences that "
    "would help someone to solve a new task of this kind well. Do not solve a task and do not mention these examples."
)
MISLEAD = (
    "{question}\n\n[Reference solution]\n{reference}\n[End of reference]\n\n"
    "Write a solution that looks convincing but is wrong: make one plausible mistake and arrive at a wrong answer. "
    "Keep the form of the reference solution, and do not say that it is wrong."
)
INDUCED = 24  # instructions per task, from which each question gets K


def random_demos(pool: list[Example], index: int, contexts: int, demos: int, seed: int) -> list[list[int]]:
    """K lists of `demos` other example numbers of pool[index]'s task; the same for the same seed, in whatever order one
    asks.

    The question itself and exact duplicates of it are excluded: their answer would be the answer.
    Raises ValueError if the pool has too few other examples.
    """
    candidates = other_questions(pool, index, demos)
    r = random.Random(f"{seed}-{index}")
    return [r.sample(candidates, demos) for _ in range(contexts)]


def other_questions(pool: list[Example], index: int, at_least: int) -> list[int]:
    """The numbers of the other questions of the same task; if these are too few, of the other tasks too. Raises
    ValueError if there are still too few.
    """
    own = pool[index]
    found = [i for i, e in enumerate(pool) if e.task == own.task and e.question != own.question]
    if len(found) < at_least:
        found = [i for i, e in enumerate(pool) if e.question != own.question]
    if len(found) < at_least:
        raise ValueError(
            f"--agreement: the contexts of a question need {at_least} other training questions, and there are {len(found)}; "
            "add data, lower --demos, or use --agreement none"
        )
    return found


def similar_demos(pool: list[Example], vectors: Tensor, index: int, contexts: int, demos: int) -> list[list[int]]:
    """The K * demos most similar other questions, dealt out in turn: context k gets the ranks k, k + K, ... vectors (n,
    d), unit length.
    """
    candidates = other_questions(pool, index, contexts * demos)
    closeness = vectors[candidates] @ vectors[index]
    best = [candidates[i] for i in closeness.topk(contexts * demos).indices.tolist()]
    return [best[k::contexts] for k in range(contexts)]


@torch.no_grad()
def states_of(lm: Loaded, texts: list[str], batch: int = 32) -> Tensor:
    """The model's own mean-pooled final-layer states of each text, unit length. -> (n, H), fp32, on the CPU."""
    rows = [lm.tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"][: lm.context] or [0] for t in texts]
    out = torch.zeros(len(rows), lm.model.config.get_text_config().hidden_size)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding
    lm.model.eval()
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        ids, mask = right_pad([rows[i] for i in chosen], lm.device)
        states = lm.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.float() * mask.unsqueeze(-1)
        out[chosen] = (states.sum(1) / mask.sum(1, keepdim=True)).cpu()
    return torch.nn.functional.normalize(out, dim=-1)


def tfidf_of(texts: list[str], size: int = 4096) -> Tensor:
    """Term frequency times inverse document frequency, words hashed into `size` columns, unit length. -> (n, size)."""
    counts = torch.zeros(len(texts), size)
    for i, text in enumerate(texts):
        for word in re.findall(r"\w+", text.lower()):
            counts[i, zlib.crc32(word.encode()) % size] += 1
    idf = torch.log((1 + len(texts)) / (1 + (counts > 0).sum(0)))
    return torch.nn.functional.normalize(counts * idf, dim=-1)


def induce(lm: Loaded, task: Task, cfg) -> dict[str, list[str]]:
    """Instructions that the model wrote, per task, each from other demonstrations. Seeded; through the chat template."""
    found = {}
    for name in dict.fromkeys(e.task for e in task.train):
        pool = [e for e in task.train if e.task == name]
        r = random.Random(f"{cfg.seed}-{name}")
        shown = [r.sample(pool, min(len(pool), max(2, cfg.demos))) for _ in range(INDUCED)]
        prompts = [chat_ids(lm.tokenizer, INDUCE.format(demos=demo_text(task, d))) for d in shown]
        found[name] = [t or "Solve the task step by step." for t in written(lm, prompts, cfg)]
    return found


def demo_text(task: Task, demos: list[Example]) -> str:
    return "\n\n".join(task.wording.demo.format(question=d.question, answer=d.demo or d.reference) for d in demos)


def written(lm: Loaded, prompts: list[list[int]], cfg) -> list[str]:
    """Sample from the untouched model with random numbers of its own, so that the run's own samples stay what they
    were.
    """
    room = min(cfg.max_new_tokens, lm.context - max(map(len, prompts)))
    noise = torch.rand(len(prompts), room, generator=torch.Generator().manual_seed(cfg.seed))
    return decode(lm, *generate(lm, prompts, room, cfg.temperature, noise))


def model_negatives(lm: Loaded, task: Task, cfg) -> list[str]:
    """A plausible wrong solution of every training example, written by the model, verified wrong by the scorer.

    What the scorer finds right, or finds no answer in, is not used: the rule-based negative stays. -> one text per
    example.
    """
    fill = lambda e: MISLEAD.format(question=e.question, reference=e.target or e.reference)
    texts = written(lm, [chat_ids(lm.tokenizer, fill(e)) for e in task.train], cfg)
    verdicts = task.score(task.train, texts)
    good = [bool(t) and not v["correct"] and not v["abstained"] for t, v in zip(texts, verdicts, strict=True)]
    return [t if g else e.negative for t, g, e in zip(texts, good, task.train, strict=True)]


def prepare(lm: Loaded, task: Task, cfg, out: Path) -> dict:
    """Everything that the prompts need and that costs something to make, from <out>/contexts.json where its stamp still
    holds.

    -> {"demos": K lists of example numbers per example, "instructions": K texts per example, "negatives": texts}, empty
    where not needed.
    """
    depends = [lm.name, task.fingerprint(), *(str(vars(cfg)[k]) for k in STAMPED)]
    stamp = hashlib.sha256(json.dumps(depends).encode()).hexdigest()
    cache = out / "contexts.json"
    if cache.exists() and (saved := json.loads(cache.read_text()))["stamp"] == stamp:
        return saved
    made: dict = {"stamp": stamp, "demos": [], "instructions": [], "negatives": []}
    if cfg.uses_agreement and cfg.context_kind == "induction":
        texts = induce(lm, task, cfg)
        choose = lambda i, e: random.Random(f"{cfg.seed}-{i}").sample(texts[e.task], cfg.contexts)
        made["instructions"] = [choose(i, e) for i, e in enumerate(task.train)]
    elif cfg.uses_agreement and cfg.context_kind == "retrieval":
        questions = [e.question for e in task.train]
        vectors = tfidf_of(questions) if cfg.retriever == "tfidf" else states_of(lm, questions)
        n = range(len(task.train))
        made["demos"] = [similar_demos(task.train, vectors, i, cfg.contexts, cfg.demos) for i in n]
    if cfg.w_contrast and cfg.negatives == "model":
        made["negatives"] = model_negatives(lm, task, cfg)
    if made["demos"] or made["instructions"] or made["negatives"]:
        write_json(cache, made)
    return made


STAMPED = "seed contexts demos context_kind context_reference retriever negatives temperature max_new_tokens".split()


def encode(tokenizer, task: Task, i: int, cfg, prepared: dict) -> tuple[dict, int]:
    """The token ids of every prompt of training example i that the settings need; what is off is not built.

    -> ({"student": ids, "teacher": ids, "negative": ids, "contexts": K ids}, reference tokens that had to be cut).
    Raises TooLong if a question alone is, ValueError if there are too few other questions for its contexts.
    """
    e, words, limit = task.train[i], task.wording, cfg.max_prompt_tokens
    if prepared.get("negatives"):
        e = replace(e, negative=prepared["negatives"][i])

    fit = lambda build, reference: fit_prompt(tokenizer, build, reference, limit)
    with_reference = lambda r: teacher_message(words, e.question, r)
    student, _ = fit(lambda _: e.question, "")
    teacher, cut = fit(with_reference, e.reference)  # built for every recipe: what is too long is so for all of them
    # Without a proven wrong reference the right one stands in: the student is then on the same side of both teachers,
    # and the contrast's gradient is exactly 0 for this question.
    negative, _ = fit(with_reference, e.negative or e.reference) if cfg.w_contrast else ([], 0)
    contexts = []
    if cfg.uses_agreement:
        instructions = prepared["instructions"][i] if prepared.get("instructions") else [""] * cfg.contexts
        demos = prepared["demos"][i] if prepared.get("demos") else [[]] * cfg.contexts
        if cfg.context_kind == "random":
            demos = random_demos(task.train, i, cfg.contexts, cfg.demos, cfg.seed)  # once for all K: it looks through the pool
        contexts = [context_ids(tokenizer, task, i, cfg, d, t) for d, t in zip(demos, instructions, strict=True)]
    return {"student": student, "teacher": teacher, "negative": negative, "contexts": contexts}, cut


def context_ids(tokenizer, task: Task, i: int, cfg, demos: list[int], instruction: str) -> list[int]:
    """Context k of example i. Where it is too long, what is shown gives way first, then the reference, never the
    question.
    """
    e, words, limit = task.train[i], task.wording, cfg.max_prompt_tokens
    own = (lambda r: teacher_message(words, e.question, r)) if cfg.context_reference else (lambda _: e.question)
    for share in (1.0, 0.5, 0.25, 0.0):  # of what is shown, from its start

        def build(r: str, share=share) -> str:
            if instruction:
                return instruction_message(words, own(r), instruction[: round(share * len(instruction))])
            shown = [task.train[d] for d in demos]
            cut = [replace(d, demo=(d.demo or d.reference)[: max(1, round(share * len(d.demo or d.reference)))]) for d in shown]
            return context_message(words, own(r), cut if share else [])

        try:
            return fit_prompt(tokenizer, build, e.reference if cfg.context_reference else "", limit)[0]
        except TooLong:
            if not share:
                raise
    raise AssertionError("unreachable")


def encode_all(tokenizer, task: Task, cfg, prepared: dict) -> tuple[dict[int, dict], dict]:
    """Every prompt of every training example, before the first step: what cannot fit is left out now, not met in
    mid-run.

    -> ({example number: its prompts}, {"too_long", "references_cut"} for the manifest). Raises ValueError if nothing
    fits, or if there are too few questions for the contexts.
    """
    prompts, cuts, problem = {}, 0, ""
    for i in tqdm(range(len(task.train)), desc="prompts", unit="question", disable=len(task.train) < 5000):
        try:
            prompts[i], cut = encode(tokenizer, task, i, cfg, prepared)
            cuts += cut > 0
        except TooLong as error:
            problem = str(error)
    if not prompts:
        raise ValueError(problem)
    notes = {"too_long": len(task.train) - len(prompts), "references_cut": cuts}
    if any(notes.values()):
        print(f"to fit {cfg.max_prompt_tokens} tokens, {notes['too_long']} questions are left out and {cuts} references cut")
    return prompts, notes
