"""explain.py - look inside one answer, token by token: what each teacher says of it.

    python explain.py "89+72"                                               the tiny world, whose references are known
    python explain.py --model DIR --question ... --reference ...            any model; --wrong, --contexts add readings
    python explain.py "89+72" --model runs/mine --base tiny --html a.html   a trained student, its frozen teacher, a page
    python explain.py --model runs/mine                                     talk to a model

The training loss is one number, made of thousands of tokens. Here is the same sum for one answer, before it is summed: what
the student thought of each token, what the teacher who saw the reference thinks of it (D), the one who saw a wrong reference
(contrast, eq. 5), and the one who saw K other contexts (weight, eq. 2). It exists because a loss curve cannot say *where* a
lesson sits: often in one token of ten. The prompts and the formula are training's own, not a copy of them.

Depends on unisd.py, losses.py, engine/, tasks/.   Try it:  python -m pytest tests/test_explain.py -q
Shapes: n tokens of the answer, V vocabulary, H hidden size, K contexts.
"""

import io
import os
import sys
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine import contexts
from engine.asking import load_models, parse, speaks_world
from engine.checkpoint import command
from engine.config import Config, make, settings_behind
from engine.head import Head, chunked_objective, chunks, head_of
from engine.loading import Loaded
from engine.page import printable, show
from engine.rollout import decode, generate, turn_end
from losses import clip_tokens, token_logps
from tasks import world
from tasks.catalog import load_task
from tasks.data import Example, Task, Wording, chat_ids, text_ids
from tasks.recognise import example_for, example_of
from unisd import Batch, read, read_plainly, score_teachers, tokens_of, weigh


@dataclass
class Token:
    """What is known of one token of the answer. Probabilities are of this token, in this place."""

    text: str
    student: float
    teacher: float
    top_student: list[tuple[str, float]]  # what it would say here: its five likeliest tokens and their probabilities
    top_teacher: list[tuple[str, float]]
    div: float  # D in nats, before any clip
    contrast: float | None  # C; None without a wrong reference
    contexts: list[float]  # log p of it under each of the K contexts
    weight: float  # w in (0, 1]; 1 without contexts


@dataclass
class Explained:
    """One answer and all that its readers say of it."""

    example: Example
    answer: str
    correct: bool | None  # None: nobody can judge it
    tokens: list[Token]
    sums: dict[str, float]  # "mean D", "weighted mean D", "mean contrast" ..., and "loss", which is eq. 1
    prompts: dict[str, str]  # reader -> its whole prompt, special tokens included
    cfg: Config


@torch.no_grad()
def explain(lm: Loaded, example: Example, answer: str | list[int] | None = None, *, task=None, cfg=None, base=None) -> Explained:
    """One answer, read as a training step would read it. answer: a text, its token ids, or None for the model's greedy one.

    task: a Task, with the wording of prompts and the examples that contexts show (None: no contexts). cfg: a Config, for the loss
    (None: plain self-distillation, and the contrast where there is a wrong reference). base: the Loaded that teaches (None: the
    student itself). Raises ValueError if something does not fit the model, or for contexts without solved examples.
    """
    words = world.WORDING if speaks_world(lm.name) else Wording()
    base, task = base or lm, task or Task("", [], [], lambda examples, texts: [], wording=words)
    cfg = cfg or make("sd", w_contrast=0.1, max_new_tokens=min(1024, lm.context // 2))
    cfg = cfg if example.negative else replace(cfg, w_contrast=0.0)
    prompts = prompts_of(lm, example, task, cfg)
    if answer is None:
        answer = write(lm, prompts["student"], cfg)
    if isinstance(answer, str):
        answer = [*text_ids(lm.tokenizer, answer), turn_end(lm)]
    if len(answer) > cfg.max_new_tokens:
        raise ValueError(f"the answer has {len(answer)} tokens: raise --max-new-tokens, which is {cfg.max_new_tokens}")
    ids = torch.tensor([answer], dtype=torch.long, device=lm.device)
    with lm.autocast():
        columns, sums = read_by_all(lm, base, prompts, ids, cfg)
    columns["text"] = [spell(lm, i) for i in answer]
    tokens = [Token(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    (text,) = decode(lm, ids, torch.ones_like(ids))
    verdict = task.score([example], [text]) if example.answer is not None else []
    named = {"student": prompts["student"], "teacher": prompts["teacher"], "wrong teacher": prompts["negative"]}
    named |= {f"context {k}": prompt for k, prompt in enumerate(prompts["contexts"], 1)}
    spelled = {name: lm.tokenizer.decode(prompt) for name, prompt in named.items() if prompt}
    return Explained(example, text, verdict[0]["correct"] if verdict else None, tokens, sums, spelled, cfg)


def read_by_all(lm: Loaded, base: Loaded, prompts: dict, ids: Tensor, cfg: Config) -> tuple[dict, dict]:
    """All read the same tokens, ids (1, n), under other prompts. -> {a field of Token: n values}, {name of a sum: its value}"""
    one = {name: [prompts[name]] for name in ("student", "teacher", "negative")}  # a step of one answer
    batch = Batch(**one, contexts=[[prompt] for prompt in prompts["contexts"]], ids=ids, mask=torch.ones_like(ids))
    head, teacher_head = head_of(lm.model, lm.vocab), head_of(base.model, lm.vocab)
    scores = score_teachers(read_plainly(base.model, teacher_head, batch), batch, cfg)
    # In training the quantile of eq. 2 and both denominators are taken over a whole step; here this answer is the step.
    weights = weigh(batch.mask, cfg, scores.contexts, dtype=torch.promote_types(scores.states.dtype, torch.float32))
    tokens = tokens_of(batch, scores, weights, cfg.clip or None)
    states = read(lm.model, batch.student, ids, batch.mask)  # (n, H)
    loss, value = chunked_objective(states, head, scores.states, teacher_head, tokens, cfg)

    columns = {"div": value["div"].tolist(), "weight": weights.reliability[0].tolist()}
    columns["contrast"] = value["contrast"].tolist() if cfg.w_contrast else [None] * ids.shape[1]
    columns["contexts"] = [[]] * ids.shape[1] if scores.contexts is None else scores.contexts[:, 0].T.tolist()
    for who, h, seen in (("student", head, states), ("teacher", teacher_head, scores.states)):
        columns[who], columns[f"top_{who}"] = likeliest(lm, seen, h, ids[0], cfg.distill_temperature)
    sums = {"mean D": tokens.plain_share @ value["div"], "loss": loss}
    sums["weighted mean D"] = tokens.share @ clip_tokens(value["div"], tokens.ceiling)
    used = [name for name in ("contrast", "match", "nll") if vars(cfg)[f"w_{name}"]]
    sums |= {f"mean {name}": tokens.plain_share @ value[name] for name in used}
    return columns, {name: x.item() for name, x in sums.items()}


def likeliest(lm: Loaded, states: Tensor, head: Head, ids: Tensor, tau: float) -> tuple[list[float], list[list]]:
    """How likely each written token was, and the five likeliest in its place. (n, H), (n,) -> n floats, n lists of (text, float)"""
    written, tops = [], []
    for piece in chunks(len(ids), 64):  # one distribution over Qwen's 151,936 tokens is 0.6 MB
        logps = head(states[piece], tau)
        written += token_logps(logps, ids[piece]).exp().tolist()
        for values, tokens in zip(*logps.exp().topk(5), strict=True):
            tops.append([(spell(lm, i), v) for i, v in zip(tokens.tolist(), values.tolist(), strict=True)])
    return written, tops


def spell(lm: Loaded, token: int) -> str:
    """A token as text; by its name in the vocabulary where it is only a part of a character, as most of an emoji are."""
    text = lm.tokenizer.decode([token])
    return lm.tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text


def prompts_of(lm: Loaded, example: Example, task: Task, cfg: Config) -> dict:
    """The prompts of all readers, made by what makes them for training. Raises ValueError if they cannot be made."""
    room = lm.context - cfg.max_new_tokens
    if room < 16:
        raise ValueError(f"--max-new-tokens {cfg.max_new_tokens} leaves no room in the model's context of {lm.context}: lower it")
    if not cfg.w_div or cfg.clip_quantile or (cfg.uses_agreement and cfg.context_kind != "random"):
        raise ValueError("what can be shown has --w-div above 0, --clip-quantile 0 and --context-kind random")
    # Demonstrations are drawn by seed and place, so a training question must stand in its own place.
    i = next((i for i, e in enumerate(task.train) if e.question == example.question), len(task.train))
    task = replace(task, train=[*task.train[:i], example, *task.train[i + 1 :]])
    cfg = replace(cfg, max_prompt_tokens=min(cfg.max_prompt_tokens, room))
    prompts, cut = contexts.encode(lm.tokenizer, task, i, cfg, {})
    if cut:
        warnings.warn(f"the last {cut} tokens of the reference do not fit and were cut", stacklevel=2)
    return prompts


def write(lm: Loaded, prompt: list[int], cfg: Config, temperature: float = 0.0, turn: int = 0) -> list[int]:
    """The model's own answer, its end-of-text token included. temperature 0 = greedy; else the seed and the turn decide."""
    noise = torch.rand(1, cfg.max_new_tokens, generator=torch.Generator().manual_seed(cfg.seed * 1_000_003 + turn))
    ids, mask = generate(lm, [prompt], cfg.max_new_tokens, temperature, noise)
    return ids[0][mask[0].bool()].tolist()


# --- the command -----------------------------------------------------------------------------------------------------
def talk(lm: Loaded, base: Loaded, task: Task | None, cfg: Config, temperature: float) -> None:
    """Question and answer until an empty line. A known question is explained at once, any other one after `ref: TEXT`."""
    print("Ask something. `ref: TEXT` explains the last answer by a teacher who saw TEXT; an empty line or :q ends.")
    question, ids, turn = "", [], 0
    while (line := input("\n> ").strip()) not in ("", ":q"):
        try:
            if line.startswith("ref:"):
                reference = line.removeprefix("ref:").strip()
                if not (question and reference):
                    raise ValueError("ask something first, then give a text: `ref: TEXT`")
                known = example_for(question, reference, None, task)
            else:
                known, turn = example_of(line, task), turn + 1
                question = known.question if known else line
                ids = write(lm, chat_ids(lm.tokenizer, question), cfg, temperature, turn)
            if known:
                show(explain(lm, known, ids, task=task, cfg=cfg, base=base))
            else:
                text = lm.tokenizer.decode(ids, skip_special_tokens=True)
                print(*(printable(part, sys.stdout.encoding) for part in text.splitlines()), sep="\n")
        except ValueError as error:
            print(error)


@command("explain.py", "the device is out of memory: lower --max-new-tokens, or use --device cpu")
def main(argv: list[str] | None = None) -> int:
    """Explain one question, or talk. -> the exit code"""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # what a terminal cannot show, or send, must not end the program
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    try:
        args, cfg = parse(argv, __doc__.partition(" - ")[2].split("\n\nDepends")[0])
        tiny, saved = args.data == "tiny", settings_behind(args.model)  # a run's questions get the references it trained with
        kind = {name: saved[name] for name in ("references", "wrong_references") if tiny and name in saved}
        sizes = dict(train_size=Config.train_size, test_size=1) if tiny else {}
        task = load_task(args.data, **sizes, seed=cfg.seed, **kind)[0] if args.data else None
        example = None if args.question is None else example_for(args.question.strip(), args.reference, args.wrong, task)
        lm, base = load_models(args, cfg)
        if example:
            answer = args.answer or write(lm, chat_ids(lm.tokenizer, example.question), cfg, args.temperature)
            show(explain(lm, example, answer, task=task, cfg=cfg, base=base), args.html)
            return 0
        try:
            talk(lm, base, task, cfg, args.temperature)
        except (KeyboardInterrupt, EOFError):  # two more ways to end a talk
            print()
        return 0
    except BrokenPipeError:  # who reads, `head` for one, has seen enough; Python must not try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
