"""Prompts: one wording for every teacher, and a reference that is cut before the question ever is."""

from datetime import datetime

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from tasks import world
from tasks.data import Example, Wording, chat_ids, context_message, fit_prompt, teacher_message
from tasks.tiny import ASSET


@pytest.fixture
def tokenizer(tiny):
    return tiny.tokenizer


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


# --- a template that shows the date ------------------------------------------------------------------------------------

DATED = "{%- set day = strftime_now('%d %b %Y') -%}{{ 'Today is ' + day + '. ' }}"


def on(monkeypatch, year):
    """transformers' own clock stands in that year."""

    class Then(datetime):
        @classmethod
        def now(cls, zone=None):
            return cls(year, 3, 4)

    monkeypatch.setattr(chat_template_utils, "datetime", Then)


def test_a_template_is_told_one_date_whatever_the_day(monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    tokenizer.chat_template = DATED + tokenizer.chat_template
    tokenizer.today, asked = "2026-11-27", []
    for year in (2030, 2031):
        on(monkeypatch, year)
        asked.append(chat_ids(tokenizer, "12+31"))
    assert asked[0] == asked[1] and tokenizer.decode(asked[0]).startswith("Today is 27 Nov 2026. <|im_start|>user")
    tokenizer.today = "2026-11-28"
    assert "28 Nov 2026" in tokenizer.decode(chat_ids(tokenizer, "12+31"))
    assert "27 Nov" not in str(tokenizer.init_kwargs)  # it is a run's, not the model's: nothing of it is saved
    del tokenizer.today  # a tokenizer of its own, whose text is the same
    assert f"{datetime.now():%d %b %Y}" in tokenizer.decode(chat_ids(tokenizer, "12+31"))
