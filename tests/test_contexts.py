"""Contexts of three kinds, with and without the reference; verified model-written negatives; caches that know when they
are stale.
"""

import json

import pytest
import torch
from conftest import steps_of
from torch.testing import assert_close

from engine import contexts
from engine.config import make
from tasks import world
from tasks.data import Example, Task

TASK = world.load(100, 2)


@pytest.fixture
def lm(tiny):
    return tiny


@pytest.fixture
def few_instructions(monkeypatch):
    monkeypatch.setattr(contexts, "INDUCED", 4)  # of 24


def test_random_demonstrations_are_of_the_task_never_of_the_question_and_repeat_for_a_seed():
    pool = [*TASK.train, Example(TASK.train[0].task, TASK.train[0].question, "a duplicate of question 0")]
    for i in range(len(pool)):
        shown = contexts.random_demos(pool, i, 3, 2, seed=5)
        assert [len(d) for d in shown] == [2, 2, 2]
        assert all(pool[d].task == pool[i].task and pool[d].question != pool[i].question for ds in shown for d in ds)
    assert contexts.random_demos(pool, 3, 3, 2, seed=5) == contexts.random_demos(pool, 3, 3, 2, seed=5)
    assert contexts.random_demos(pool, 3, 3, 2, seed=5) != contexts.random_demos(pool, 3, 3, 2, seed=6)
    few = [Example(name, str(i), "r") for i, name in enumerate("aab")]  # "b" has no other: those of "a" stand in
    assert contexts.other_questions(few, 0, 1) == [1] and contexts.other_questions(few, 2, 1) == [0, 1]
    assert contexts.other_questions(few, 0, 2) == [1, 2]
    with pytest.raises(ValueError, match="need 3 other training questions, and there are 2"):
        contexts.other_questions(few, 0, 3)


def test_retrieval_finds_the_similar_ones_but_never_the_question_or_its_duplicate():
    words = ["red apple pie", "red apple tart", "red apple pie", "blue steel beam", "blue steel rod", "green tea"]
    pool = [Example("t", w, "r") for w in words]
    known = sorted({word for text in words for word in text.split()})
    vectors = torch.nn.functional.normalize(torch.tensor([[float(word in text.split()) for word in known] for text in words]))
    assert contexts.similar_demos(pool, vectors, 0, 1, 1) == [[1]]  # not 2, which is the same question again
    assert contexts.similar_demos(pool, vectors, 3, 1, 1) == [[4]]
    two = contexts.similar_demos(pool, vectors, 0, 2, 2)  # ranks dealt out in turn: both contexts get good ones
    assert two[0][0] == 1 and len({d for ds in two for d in ds}) == 4


def test_states_are_the_models_own_means_whatever_the_padding(lm):
    texts = ["47+38", "where is lamp: mill, cave, port, barn"]
    vectors = contexts.states_of(lm, texts)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            states = lm.model.model(input_ids=torch.tensor([lm.tokenizer(text)["input_ids"]])).last_hidden_state[0]
        assert_close(vector, torch.nn.functional.normalize(states.mean(0), dim=0), rtol=1e-4, atol=1e-5)


def test_the_models_states_find_the_same_family(lm):
    vectors = contexts.states_of(lm, [e.question for e in TASK.train])
    near = (vectors @ vectors.T).fill_diagonal_(-1).argmax(1)
    same = [TASK.train[i].task == TASK.train[j].task for i, j in enumerate(near.tolist())]
    assert sum(same) > 0.9 * len(same)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "retrieval", "induction"])
@pytest.mark.parametrize("with_reference", [True, False])
def test_the_grid(lm, kind, with_reference, tmp_path, few_instructions):
    sizes = dict(contexts=2, demos=2, max_prompt_tokens=400, max_new_tokens=20)
    cfg = make("agree-token", context_kind=kind, context_reference=with_reference, **sizes)
    prepared = contexts.prepare(lm, TASK, cfg, tmp_path)
    prompts, cut = contexts.encode(lm.tokenizer, TASK, 7, cfg, prepared)
    texts = [lm.tokenizer.decode(p) for p in prompts["contexts"]]
    own = TASK.train[7]
    assert cut == 0 and len(set(texts)) == 2
    for text in texts:
        assert own.question in text and text.endswith("<|im_start|>assistant\n")
        assert (f"hint: {own.reference}" in text) == with_reference
        assert text.count("example:") == (0 if kind == "induction" else 2)
    assert contexts.prepare(lm, TASK, cfg, tmp_path) == prepared


def shown_in(lm, prompt):
    return lm.tokenizer.decode(prompt).rsplit("hint: ", 1)[1].partition("<|im_end|>")[0]


def test_contexts_with_references_of_their_own(lm):
    """Each of the K draws blots and mistakes anew, the same ones every time; question, teacher and demonstrations stay."""
    task = world.load(500, 2, wrong_references=0.35)
    own, fresh = make("agree-token", wrong_references=0.35), make("agree-token", wrong_references=0.35, fresh_references=True)
    differ, wrong, mixed = 0, 0, 0
    for i in range(60):
        (before, _), (after, _), (again, _) = (contexts.encode(lm.tokenizer, task, i, cfg, {}) for cfg in (own, fresh, fresh))
        assert after == again and {**before, "contexts": 0} == {**after, "contexts": 0}
        assert {shown_in(lm, prompt) for prompt in before["contexts"]} == {shown_in(lm, before["teacher"])}
        shown = [shown_in(lm, prompt) for prompt in after["contexts"]]
        assert shown == [task.fresh(task.train[i], k) for k in range(3)]
        differ += len(set(shown)) > 1  # from each other, not only from the teacher's
        readable = [text for text in shown if "_" not in text]
        verdicts = [v["correct"] for v in task.score([task.train[i]] * len(readable), readable)]
        wrong, mixed = wrong + verdicts.count(False), mixed + (len(set(verdicts)) == 2)
    assert differ > 40 and wrong > 3 and mixed > 3  # wrong or not is drawn for each, not once for the question


def test_the_teachers_own_reading_can_be_one_of_the_contexts(lm):
    plain, cfg = make("agree-token"), make("agree-token", contexts_include_teacher=True)
    (before, _), (after, _) = (contexts.encode(lm.tokenizer, TASK, 7, c, {}) for c in (plain, cfg))
    assert after["contexts"] == [after["teacher"], *before["contexts"][1:]] and before["contexts"][0] != before["teacher"]


def test_the_cache_is_used_while_its_stamp_holds_and_made_again_when_not(lm, tmp_path, monkeypatch):
    cfg = make("agree-token", context_kind="retrieval")
    first = contexts.prepare(lm, TASK, cfg, tmp_path)
    monkeypatch.setattr(contexts, "states_of", lambda *_: pytest.fail("made again although nothing changed"))
    assert contexts.prepare(lm, TASK, cfg, tmp_path) == first
    monkeypatch.undo()
    for change in (dict(seed=1), dict(demos=2), dict(contexts=4)):
        other = contexts.prepare(lm, TASK, make("agree-token", context_kind="retrieval", **change), tmp_path)
        assert other["stamp"] != first["stamp"]
    assert contexts.prepare(lm, world.load(100, 3), cfg, tmp_path)["stamp"] != first["stamp"]  # another data set


def test_making_them_leaves_the_runs_random_numbers_alone(lm, tmp_path, few_instructions):
    cfg = make("agree-token", context_kind="induction", max_new_tokens=12)
    torch.manual_seed(3)
    contexts.prepare(lm, TASK, cfg, tmp_path / "a") if (tmp_path / "a").mkdir() is None else None
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)


def test_model_written_negatives_are_verified(lm, monkeypatch):
    train_set = [Example("sum", f"{i}+1", str(i + 1), answer=str(i + 1), negative="0") for i in range(10, 14)]
    task = Task("t", train_set, [], world.score)
    monkeypatch.setattr(contexts, "written", lambda *_: ["so 99", "so 12", "no number", ""])
    assert contexts.model_negatives(lm, task, make("contrast")) == [
        "so 99",
        "0",
        "0",
        "0",
    ]  # right, silent, empty: the rule's stays


def test_without_a_negative_the_contrast_has_no_gradient(lm, tmp_path):
    cfg = make("contrast")
    task = Task("t", [Example("sum", "10+1", "11", answer="11")] * 2, [], world.score, wording=world.WORDING)
    prompts, _ = contexts.encode(lm.tokenizer, task, 0, cfg, {"negatives": [], "shown": []})
    assert prompts["negative"] == prompts["teacher"]


def test_a_cut_reference_is_counted(lm):
    cfg = make("sd", max_prompt_tokens=30)
    long = Example("fact", "where is lamp: mill", "cave " * 40)
    task = Task("t", [long], [], world.score, wording=world.WORDING)
    prompts, cut = contexts.encode(lm.tokenizer, task, 0, cfg, {"negatives": [], "shown": []})
    assert cut > 0 and len(prompts["teacher"]) <= 30 and "where is lamp: mill" in lm.tokenizer.decode(prompts["teacher"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retrieval", "induction"])
def test_a_run_with_prepared_contexts_resumes(kind, tmp_path):
    fast = dict(
        steps=2,
        batch=4,
        micro_batch=4,
        eval_size=1,
        train_size=15,
        max_new_tokens=16,
        context_kind=kind,
        negatives="model",
        w_contrast=0.1,
    )
    straight, rows = steps_of(tmp_path / "a", "agree-seq", **fast)
    assert len(json.loads((tmp_path / "a" / "contexts.json").read_text())["negatives"]) == 15
    steps_of(tmp_path / "b", "agree-seq", last=1, **fast)
    resumed, rows_again = steps_of(tmp_path / "b", "agree-seq", resume=True, **fast)
    assert len(rows) == 2 and rows == rows_again
    for n, p in straight.lm.model.state_dict().items():
        assert torch.equal(p, resumed.lm.model.state_dict()[n])
