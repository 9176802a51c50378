"""Prompts: one wording for every teacher, and a reference that is cut before the question ever is."""

import pytest
import torch

from engine.rollout import load
from tasks import world
from tasks.data import Example, Wording, chat_ids, context_message, fit_prompt, teacher_message


@pytest.fixture(scope="module")
def tokenizer():
    return load("tiny", torch.device("cpu")).tokenizer


def test_the_student_never_sees_the_reference():
    e = Example("t", "QUESTION", "REFERENCE", negative="NEGATIVE", demo="DEMO")
    w = Wording()
    assert "REFERENCE" in teacher_message(w, e.question, e.reference)
    assert teacher_message(w, e.question, e.reference).replace("REFERENCE", "NEGATIVE") == teacher_message(
        w, e.question, e.negative
    )
    other = Example("t", "OTHER", "ITS REFERENCE", demo="WORKED")
    shown = context_message(w, e.question, [other])
    assert "OTHER" in shown and "WORKED" in shown and "QUESTION" in shown and "\nREFERENCE" not in shown
    assert "\nREFERENCE" in context_message(w, teacher_message(w, e.question, e.reference), [other])


def test_an_empty_example_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Example("t", " ", "r")


def test_a_long_reference_is_cut_and_the_question_is_not(tokenizer):
    build = lambda r: teacher_message(world.WORDING, "where is lamp", r)
    whole, cut = fit_prompt(tokenizer, build, "cave " * 50, 500)
    assert cut == 0
    ids, cut = fit_prompt(tokenizer, build, "cave " * 50, 40)
    text = tokenizer.decode(ids)
    assert len(ids) <= 40 and cut > 0 and "where is lamp" in text and text.endswith("<|im_start|>assistant\n")
    with pytest.raises(ValueError, match="max-prompt-tokens"):
        fit_prompt(tokenizer, build, "cave", 5)


def test_chat_ids_are_the_templates_and_nothing_more(tokenizer):
    assert tokenizer.decode(chat_ids(tokenizer, "47+38")) == "<|im_start|>user\n47+38<|im_end|>\n<|im_start|>assistant\n"
