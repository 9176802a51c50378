"""data.py - one question with all that is known about it, and the prompts made of it.

`Example` is one training or test question; `Task` is a set of them with its prompt wording and its scorer. One question is read
under several prompts, and nothing but the prompt tells student and teachers apart:

    student    question                          teacher    question + reference
    negative   question + wrong reference        context k  demonstrations + question (+ reference)

It exists so that all four share one wording: two teachers then differ in content only, and no loss can be earned from format.

Depends on nothing of ours.   Try it:  python -m pytest tests/test_data.py -q
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

MARK = "where-a-text-will-stand"  # a template's own words are what stands around it


class TooLong(ValueError):
    """A question that does not fit, even without its reference."""


@dataclass(frozen=True)
class Example:
    """One question. The student sees `question`, only teachers see `reference` and `negative`, only the scorer sees `answer`."""

    task: str  # the family or benchmark: which scorer judges it, which row of the table it is counted in
    question: str  # the whole user message, options and format instructions included
    reference: str  # what only the teacher sees: a solution, worked or terse; SFT's target too, unless `target` is given
    answer: Any = None  # what the scorer compares with
    negative: str = ""  # a plausible *wrong* reference, verified wrong, in the reference's own template
    target: str = ""  # what SFT imitates ("" = the reference)
    demo: str = ""  # how this example is answered when it serves as a demonstration ("" = its reference)

    def __post_init__(self):
        if not self.question.strip() or not self.reference.strip():
            raise ValueError(f"an example of task {self.task!r} has an empty question or reference")


@dataclass(frozen=True)
class Wording:
    """The words around an example; fields in braces are filled. The benchmarks share these, the tiny world has short ones."""

    # A model of 135 M parameters uses a reference in this wording; docs/real-models.md has those in which it did not.
    teacher: str = "{question}\n\nA correct solution is:\n{reference}\n\nNow give the solution in the same form."
    demo: str = "[Solved example]\n{question}\n{answer}\n[End of example]"
    context: str = "{demos}\n\nNow your task, which is another one:\n\n{question}"
    instruction: str = "[General instruction]\n{instruction}\n\n{question}"


@dataclass
class Task:
    """What is trained on and how it is judged."""

    name: str
    train: list[Example]
    test: list[Example]
    score: Callable[[Sequence[Example], Sequence[str]], list[dict]]  # (examples, completions) -> {"correct", "abstained" ...} each
    ood: list[Example] = field(default_factory=list)  # harder, out-of-distribution test questions
    wording: Wording = field(default_factory=Wording)
    max_new_tokens: int = 1024
    fresh: Callable[[Example, int], str] | None = None  # (example, k) -> another reference: other blots, wrong or not by itself

    def fingerprint(self) -> str:
        """A hash of all examples in order: equal hashes mean the same data, whatever the recipe."""
        rows = [[asdict(example) for example in part] for part in (self.train, self.test, self.ood)]
        return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()[:16]


def render(tokenizer, *texts: str, prompt: bool = False) -> str:
    """A chat as its template writes it, user and assistant in turn; prompt: the assistant's header follows. "Thinking" is off."""
    stop_clock(tokenizer)
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt, enable_thinking=False)


def plain_ids(tokenizer, text: str, **how) -> list[int]:
    """The ids of a text with its special tokens in it. Not verbose: prompts that are too long are handled, and reported, by us."""
    return tokenizer(text, add_special_tokens=False, verbose=False, **how)["input_ids"]


@lru_cache(maxsize=8)
def control_tokens(tokenizer, template: str, size: int) -> tuple[dict[int, str], int]:
    """Special tokens, and all that the template marks turns with. -> ({id: its text}, how many a prompt has of them)
    template, size: tokenizer.chat_template and len(tokenizer), with which the answer changes."""
    frame, around = render(tokenizer, "x", "x", "x"), render(tokenizer, MARK, prompt=True).split(MARK)
    marks = lambda token: token.special or (token.content.strip() and token.content in frame)
    found = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if marks(token)}
    return found, sum(i in found for part in around for i in plain_ids(tokenizer, part))


def text_ids(tokenizer, text: str) -> list[int]:
    """The ids of a text that is nothing but text: where <|im_end|> stands in it, these are ten characters, and they end nothing."""
    control, _ = control_tokens(tokenizer, str(tokenizer.chat_template), len(tokenizer))
    for how in ({}, {"split_special_tokens": True}):
        if control.keys().isdisjoint(ids := plain_ids(tokenizer, text, **how)):
            return ids
    # Some are not "special", or are words of the vocabulary: cut behind its first character, each is a token no more.
    inside = "|".join(f"(?<={re.escape(c[0])})(?={re.escape(c[1:])})" for c in control.values())
    return [i for piece in re.split(inside, text) for i in plain_ids(tokenizer, piece, split_special_tokens=True)]


def chat_ids(tokenizer, message: str) -> list[int]:
    """A user message as prompt ids, up to and including the assistant header. "Thinking" is off, in training and evaluation.
    Nothing in the message controls; ValueError where the template rewrites one in which a control token stands."""
    control, usual = control_tokens(tokenizer, str(tokenizer.chat_template), len(tokenizer))
    ids = plain_ids(tokenizer, text := render(tokenizer, message, prompt=True))
    if sum(i in control for i in ids) == usual or text_ids(tokenizer, message) == plain_ids(tokenizer, message):
        return ids
    head, _, tail = render(tokenizer, MARK, prompt=True).partition(MARK)
    if not (text.startswith(head) and text.endswith(tail)):
        raise ValueError(f"the chat template rewrites the text {message[:60]!r}, in which a control token stands: take that out")
    said = text[len(head) : len(text) - len(tail)]  # the message, which some templates strip
    return plain_ids(tokenizer, head) + text_ids(tokenizer, said) + plain_ids(tokenizer, tail)


def opened_tag(tokenizer) -> str:
    """The tag, <think> for one, that the template leaves open before an answer, or "". ValueError if it hides the message."""
    _, mark, header = render(tokenizer, MARK, prompt=True).rpartition(MARK)
    if not mark:  # it wants lists of parts
        raise ValueError("it leaves out, or rewrites, what the user says")
    tags = re.findall(r"[<\[◁][^<>[\]]*(?:think|thought|reason)[^<>[\]]*[>\]▷]", header, re.IGNORECASE)
    return tags[-1] if tags and not re.search("/|end", tags[-1], re.IGNORECASE) else ""


def stop_clock(tokenizer) -> None:
    """A template that shows the date (Llama 3.1's does) asks a function for it. Where tokenizer.today is set, an ISO date, this is
    what it is told: a run that is resumed on another day, or measures after midnight, still asks the same.
    """
    if "strftime_now" in str(getattr(tokenizer, "chat_template", "")):
        # It keeps one for each text. (5.24 hands a template plain data only: the function cannot be passed along.)
        from transformers.utils.chat_template_utils import _compile_jinja_template as compiled

        today = getattr(tokenizer, "today", "") or datetime.now().isoformat()
        compiled(tokenizer.get_chat_template()).globals["strftime_now"] = datetime.fromisoformat(today).strftime


def teacher_message(wording: Wording, question: str, reference: str) -> str:
    return wording.teacher.format(question=question, reference=reference)


def context_message(wording: Wording, own: str, demos: Sequence[Example]) -> str:
    """Demonstrations of *other* questions, then `own`: the question, with or without its reference."""
    shown = "\n\n".join(wording.demo.format(question=demo.question, answer=demo.demo or demo.reference) for demo in demos)
    return wording.context.format(demos=shown, question=own)


def instruction_message(wording: Wording, own: str, instruction: str) -> str:
    """A general instruction, then `own`: the question, with or without its reference."""
    return wording.instruction.format(instruction=instruction, question=own)


def fit_prompt(tokenizer, build: Callable[[str], str], reference: str, limit: int) -> tuple[list[int], int]:
    """Prompt ids of build(reference), the *reference* shortened from its end until the prompt has at most `limit` tokens.

    -> (ids, how many reference tokens were cut). Cutting the ids instead would lose the question or the assistant header.
    Raises TooLong if even the prompt without the reference is over the limit.
    """
    ids = chat_ids(tokenizer, build(reference))
    tokens = text_ids(tokenizer, reference) if len(ids) > limit else []
    kept = len(tokens)
    while len(ids) > limit and kept > 0:
        kept = max(0, kept - (len(ids) - limit))
        ids = chat_ids(tokenizer, build(tokenizer.decode(tokens[:kept])))
    if len(ids) > limit:
        advice = "shorten it, raise --max-prompt-tokens, or, where the model's context is the limit, lower --max-new-tokens"
        raise TooLong(f"a question of {len(ids)} tokens without its reference is over the limit of {limit}: {advice}")
    return ids, len(tokens) - kept
