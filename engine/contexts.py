"""contexts.py - what else the teacher may see: K contexts for the agreement weights (eq. 2), and model-written negatives.

Context k of a question is the same task, seen through something else, with or without its own reference:

    random      solved examples of other questions of the same task, drawn at random
    retrieval   the most similar ones, by the model's own mean-pooled states
    induction   a general instruction, which the model itself wrote after looking at solved examples

The same answer is read under all K of them; where the readings differ, it is the context that differs, never the task. What was
made is kept in a file stamped with everything it depends on, and made again when any of that changes.

Depends on data.py, rollout.py, checkpoint.py.   Try it:  python -m pytest tests/test_contexts.py -q
"""

import hashlib
import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.checkpoint import write_json
from engine.loading import Loaded
from engine.rollout import decode, generate, right_pad
from tasks.data import Example, Task, TooLong, chat_ids, context_message, fit_prompt, instruction_message, teacher_message, text_ids

INDUCE = "{demos}\n\nThe examples above are solved tasks of one kind. Write one general instruction of two or three sentences that "
INDUCE += "would help someone to solve a new task of this kind well. Do not solve a task and do not mention these examples."
MISLEAD = "{question}\n\n[Reference solution]\n{reference}\n[End of reference]\n\nWrite a solution that looks convincing but is "
MISLEAD += "wrong: make one plausible mistake and arrive at a wrong answer. Keep the form of the reference solution, and do not "
MISLEAD += "say that it is wrong."
INDUCED = 24  # instructions per task, from which each question gets K
STAMPED = "seed contexts demos context_kind context_reference negatives temperature max_new_tokens".split()  # see prepare


def random_demos(pool: list[Example], index: int, contexts: int, demos: int, seed: int) -> list[list[int]]:
    """K lists of `demos` other_questions, drawn at random; the same for the same seed, in whatever order one asks."""
    candidates = other_questions(pool, index, demos)
    r = random.Random(f"{seed}-{index}")
    return [r.sample(candidates, demos) for _ in range(contexts)]


def other_questions(pool: list[Example], index: int, at_least: int) -> list[int]:
    """The numbers of the other questions of pool[index]'s task; if these are too few, of the other tasks too. Exact duplicates of
    the question are left out: their answer would be the answer. Raises ValueError if there are too few.
    """
    own = pool[index]
    found = [i for i, e in enumerate(pool) if e.task == own.task and e.question != own.question]
    if len(found) < at_least:
        found = [i for i, e in enumerate(pool) if e.question != own.question]
    if len(found) < at_least:
        short = f"need {at_least} other training questions, and there are {len(found)}"
        raise ValueError(f"--agreement: the contexts of a question {short}; add data, lower --demos, or use --agreement none")
    return found


def similar_demos(pool: list[Example], vectors: Tensor, index: int, contexts: int, demos: int) -> list[list[int]]:
    """The K * demos most similar other questions, dealt out: context k gets the ranks k, k + K, ... vectors (n, d), unit length."""
    candidates = other_questions(pool, index, contexts * demos)
    best = [candidates[i] for i in (vectors[candidates] @ vectors[index]).topk(contexts * demos).indices.tolist()]
    return [best[k::contexts] for k in range(contexts)]


@torch.no_grad()
def states_of(lm: Loaded, texts: list[str], batch: int = 32) -> Tensor:
    """The model's own mean-pooled final-layer states of each text, unit length. -> (n, H), fp32, on the CPU."""
    rows = [text_ids(lm.tokenizer, t)[: lm.context] or [0] for t in texts]
    out = torch.zeros(len(rows), lm.model.config.get_text_config().hidden_size)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding
    lm.model.eval()
    for chosen in (order[start : start + batch] for start in range(0, len(order), batch)):
        ids, mask = right_pad([rows[i] for i in chosen], lm.device)
        states = lm.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.float() * mask.unsqueeze(-1)
        out[chosen] = (states.sum(1) / mask.sum(1, keepdim=True)).cpu()
    return torch.nn.functional.normalize(out, dim=-1)


def induce(lm: Loaded, task: Task, cfg) -> dict[str, list[str]]:
    """Instructions that the model wrote, per task, each from other demonstrations. Seeded; through the chat template."""
    show = lambda e: task.wording.demo.format(question=e.question, answer=e.demo or e.reference)
    found = {}
    for name in dict.fromkeys(e.task for e in task.train):
        pool = [e for e in task.train if e.task == name]
        r = random.Random(f"{cfg.seed}-{name}")
        shown = [r.sample(pool, min(len(pool), max(2, cfg.demos))) for _ in range(INDUCED)]
        prompts = [chat_ids(lm.tokenizer, INDUCE.format(demos="\n\n".join(map(show, demos)))) for demos in shown]
        found[name] = [t or "Solve the task step by step." for t in written(lm, prompts, cfg)]
    return found


def written(lm: Loaded, prompts: list[list[int]], cfg) -> list[str]:
    """Sampled from the untouched model with random numbers of their own, so that the run's own samples stay what they were."""
    room = min(cfg.max_new_tokens, lm.context - max(map(len, prompts)))
    noise = torch.rand(len(prompts), room, generator=torch.Generator().manual_seed(cfg.seed))
    return decode(lm, *generate(lm, prompts, room, cfg.temperature, noise))


def model_negatives(lm: Loaded, task: Task, cfg) -> list[str]:
    """A plausible wrong solution of every training example, by the model, proven by the scorer; else the example's own negative."""
    fill = lambda e: MISLEAD.format(question=e.question, reference=e.target or e.reference)
    texts = written(lm, [chat_ids(lm.tokenizer, fill(e)) for e in task.train], cfg)
    verdicts = task.score(task.train, texts)
    good = [bool(t) and not v["correct"] and not v["abstained"] for t, v in zip(texts, verdicts, strict=True)]
    return [t if g else e.negative for t, g, e in zip(texts, good, task.train, strict=True)]


def prepare(lm: Loaded, task: Task, cfg, out: Path) -> dict:
    """What the prompts need and costs something to make, from <out>/contexts.json where its stamp still holds. [] where not needed.
    -> {"shown": K lists of example numbers, or K instructions, per example; "negatives": a text per example}
    """
    depends = [lm.name, task.fingerprint(), *(str(vars(cfg)[k]) for k in STAMPED)]
    stamp, cache = hashlib.sha256(json.dumps(depends).encode()).hexdigest(), out / "contexts.json"
    if cache.exists() and (saved := json.loads(cache.read_text()))["stamp"] == stamp:
        return saved
    made = {"stamp": stamp, "shown": [], "negatives": []}
    if cfg.uses_agreement and cfg.context_kind == "induction":
        texts = induce(lm, task, cfg)
        choose = lambda i, e: random.Random(f"{cfg.seed}-{i}").sample(texts[e.task], cfg.contexts)
        made["shown"] = [choose(i, e) for i, e in enumerate(task.train)]
    elif cfg.uses_agreement and cfg.context_kind == "retrieval":
        vectors = states_of(lm, [e.question for e in task.train])
        made["shown"] = [similar_demos(task.train, vectors, i, cfg.contexts, cfg.demos) for i in range(len(vectors))]
    if cfg.w_contrast and cfg.negatives == "model":
        made["negatives"] = model_negatives(lm, task, cfg)
    if made["shown"] or made["negatives"]:
        write_json(cache, made)
    return made


def encode(tokenizer, task: Task, i: int, cfg, prepared: dict) -> tuple[dict, int]:
    """The prompts of training example i that the settings need; what is off is not built. Raises TooLong if a question alone is,
    ValueError if there are too few other questions for its contexts.
    -> ({"student": ids, "teacher": ids, "negative": ids, "contexts": K ids}, reference tokens that had to be cut)
    """
    e, words, limit = task.train[i], task.wording, cfg.max_prompt_tokens
    if prepared.get("negatives"):
        e = replace(e, negative=prepared["negatives"][i])
    fit = lambda build, reference: fit_prompt(tokenizer, build, reference, limit)
    with_reference = lambda r: teacher_message(words, e.question, r)
    student, _ = fit(lambda _: e.question, "")
    teacher, cut = fit(with_reference, e.reference)  # built for every recipe: what is too long is so for all of them
    # Without a proven wrong reference the right one stands in: both teachers are one, and the contrast's gradient is exactly 0.
    negative, _ = fit(with_reference, e.negative or e.reference) if cfg.w_contrast else ([], 0)
    contexts = []
    if cfg.uses_agreement:
        drawn = cfg.context_kind == "random"  # once for all K: it looks through the pool
        shown = random_demos(task.train, i, cfg.contexts, cfg.demos, cfg.seed) if drawn else prepared["shown"][i]
        references = [task.fresh(e, k) if cfg.fresh_references else e.reference for k in range(cfg.contexts)]
        contexts = [context_ids(tokenizer, task, i, cfg, *both) for both in zip(shown, references, strict=True)]
        contexts[0] = teacher if cfg.contexts_include_teacher else contexts[0]  # not read twice, if all are (reading.py)
    return {"student": student, "teacher": teacher, "negative": negative, "contexts": contexts}, cut


def context_ids(tokenizer, task: Task, i: int, cfg, shown: list[int] | str, reference: str) -> list[int]:
    """The context of example i that shows these examples, or this instruction; too long, it gives way first, then the reference."""
    e, words, limit = task.train[i], task.wording, cfg.max_prompt_tokens
    own = (lambda r: teacher_message(words, e.question, r)) if cfg.context_reference else (lambda _: e.question)

    def build(share: float, r: str) -> str:
        if isinstance(shown, str):
            return instruction_message(words, own(r), shown[: round(share * len(shown))])
        demos = [task.train[d] for d in shown if share]
        cut = [replace(d, demo=(d.demo or d.reference)[: max(1, round(share * len(d.demo or d.reference)))]) for d in demos]
        return context_message(words, own(r), cut)

    for share in (1.0, 0.5, 0.25, 0.0):  # of what is shown, from its start
        try:
            return fit_prompt(tokenizer, partial(build, share), reference if cfg.context_reference else "", limit)[0]
        except TooLong:
            if not share:
                raise


def encode_all(tokenizer, task: Task, cfg, prepared: dict) -> tuple[dict[int, dict], dict]:
    """Every prompt of every training example, before the first step: what cannot fit is left out now, not met in mid-run. Raises
    ValueError if nothing fits, or if there are too few questions for the contexts.
    -> ({example number: its prompts}, {"too_long", "references_cut"} for the manifest)
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
