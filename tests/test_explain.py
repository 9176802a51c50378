"""explain.py: its numbers against a direct forward pass and against training's own objective; what is known of a question;
the table and the page, whatever the tokens are; the talk; every refusal.
"""

import builtins
import io
import json
import os
import random
import re
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import explain as command
from engine import contexts
from engine.asking import parse, speaks_world
from engine.config import Config, make
from engine.head import head_of
from engine.loading import load
from engine.page import columns_of, fitted, html_page, number, printable, show, table
from engine.pretrained import TINY
from engine.reading import PackedReader
from explain import explain
from tasks import world
from tasks.data import Example, Task, chat_ids
from tasks.recognise import example_for, example_of, recognise
from unisd import Batch, feature_matching, objective, read, score_teachers, tokens_of, weigh

CPU = torch.device("cpu")
TASK = world.load(60, 1)
SUM = Example("sum", "89+72", "161", "161", "151")
WRITTEN = "9+2=12 8+7+1=17 so 172"  # the carry's column is wrong


@pytest.fixture(scope="module")
def lm():
    return load("tiny", CPU)


@pytest.fixture(scope="module")
def wide():
    return load("tiny", CPU, torch.float64)


@pytest.fixture
def command_with(lm, monkeypatch):
    """The command, with a small training set and the model already loaded."""
    monkeypatch.setattr("engine.asking.load", lambda name, device: lm)
    monkeypatch.setattr(Config, "train_size", 60)
    return lambda *argv: command.main([*argv, "--device", "cpu"])


# --- the numbers


def direct(lm, prompt, ids):
    """Log-probabilities (n, V) of an answer's places, from the model's own logits."""
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, : lm.vocab]
    return logits.log_softmax(-1)


def test_every_number_is_that_of_a_direct_forward_pass(wide):
    cfg = make("sd", agreement="token", contexts=3, gamma=1.0, w_contrast=0.1, margin=0.5)
    x = explain(wide, SUM, WRITTEN, task=TASK, cfg=cfg)
    message = lambda text: chat_ids(wide.tokenizer, text)
    ids = [*wide.tokenizer(WRITTEN)["input_ids"], wide.eos[0]]
    student, teacher = direct(wide, message("89+72"), ids), direct(wide, message("89+72\nhint: 161"), ids)
    wrong = direct(wide, message("89+72\nhint: 151"), ids)
    # The question is new: it stands behind the 60 of training, and its demonstrations are drawn for that place.
    pool = [e for e in TASK.train if e.task == "sum"]
    dice = random.Random("0-60")
    demos = [dice.sample(pool, 1)[0] for _ in range(3)]
    said = [direct(wide, message(f"example: {d.question}\nanswer: {d.demo}\nnow: 89+72\nhint: 161"), ids) for d in demos]
    own = torch.arange(len(ids)), torch.tensor(ids)
    div = (teacher.exp() * (teacher - student)).sum(-1)
    contrast = (0.5 + (student[own] - teacher[own]).abs() - (student[own] - wrong[own]).abs()).clamp(min=0)
    readings = torch.stack([r[own] for r in said])
    delta = ((readings - readings.mean(0)) ** 2).sum(0) / 2
    w = 1 / (1 + (delta / delta.quantile(0.95)).clamp(max=10))
    close = lambda found, want: torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), want, rtol=0, atol=1e-11)
    close([t.student for t in x.tokens], student[own].exp())
    close([t.teacher for t in x.tokens], teacher[own].exp())
    close([t.div for t in x.tokens], div)
    close([t.contrast for t in x.tokens], contrast)
    close([t.contexts for t in x.tokens], readings.T.contiguous())
    close([t.weight for t in x.tokens], w)
    close([[p for _, p in t.top_teacher] for t in x.tokens], teacher.exp().topk(5).values)
    assert [t.top_student[0][0] for t in x.tokens] == [wide.tokenizer.decode(i) for i in student.argmax(-1).tolist()]
    assert [t.text for t in x.tokens] == [wide.tokenizer.decode(i) for i in ids] and x.answer == WRITTEN
    close(x.sums["mean D"], div.mean())
    close(x.sums["weighted mean D"], (w * div).sum() / w.sum())
    close(x.sums["loss"], (w * div).sum() / w.sum() + 0.1 * contrast.mean())
    assert x.correct is False and w.min() < 0.6 and div.max() > 3


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(divergence="reverse", clip=0.5),
        dict(recipe="unisd-star", w_nll=0.2),
        dict(divergence="jsd", alpha=0.3, agreement="sequence", stat="range"),
        dict(agreement="token", contexts=4, gamma=5.0, w_contrast=0.3, margin=1.0, context_reference=False),
    ],
)
def test_the_loss_is_the_objectives(lm, settings):
    cfg = make(**{"recipe": "sd"} | settings)
    x = explain(lm, SUM, WRITTEN, task=TASK, cfg=cfg)
    p = command.prompts_of(lm, SUM, TASK, cfg)
    ids = torch.tensor([[*lm.tokenizer(WRITTEN)["input_ids"], lm.eos[0]]])
    one = {name: [p[name]] for name in ("student", "teacher", "negative")}
    batch = Batch(**one, contexts=[[c] for c in p["contexts"]], ids=ids, mask=torch.ones_like(ids))
    head = head_of(lm.model, lm.vocab)
    with torch.no_grad():  # as train.py does it: packed readings, and eq. 1 on whole tensors
        scores = score_teachers(PackedReader(lm.model, head, batch, 1024), batch, cfg)
        tokens = tokens_of(batch, scores, weigh(batch.mask, cfg, scores.contexts), cfg.clip or None)
        states = read(lm.model, batch.student, ids, batch.mask)
        loss = objective(head(states), head(scores.states), tokens, cfg)[0]
        loss += feature_matching(states, scores.states, tokens, cfg)[0]
    assert x.sums["loss"] == pytest.approx(loss.item(), abs=1e-6)
    last = next(line for line in table(x).splitlines() if line.startswith("loss"))
    assert float(last.split()[1]) == pytest.approx(loss.item(), abs=2e-6)
    terms = re.findall(r"([\d.]+) \* ([\d.]+)", last)
    assert sum(float(w) * float(v) for w, v in terms) == pytest.approx(loss.item(), abs=2e-6)
    assert len(terms) == sum(map(bool, (cfg.w_div, cfg.w_contrast, cfg.w_match, cfg.w_nll)))
    assert ("clipped at 0.5" in table(x)) == bool(cfg.clip)


def test_the_prompts_are_trainings(lm):
    cfg = make("unisd-star", seed=3)
    for i in (0, 4, 59):
        want, _ = contexts.encode(lm.tokenizer, TASK, i, cfg, {})
        x = explain(lm, TASK.train[i], task=TASK, cfg=cfg)
        assert command.prompts_of(lm, TASK.train[i], TASK, cfg) == want
        named = ["student", "teacher", "wrong teacher", "context 1", "context 2", "context 3"]
        ids = [want["student"], want["teacher"], want["negative"], *want["contexts"]]
        assert x.prompts == {name: lm.tokenizer.decode(prompt) for name, prompt in zip(named, ids, strict=True)}


def test_a_base_teaches_and_the_student_is_the_students(lm):
    base = load("tiny", CPU)
    with torch.no_grad():
        base.model.model.norm.weight.mul_(0.5)
    both, alone, other = explain(lm, SUM, WRITTEN, base=base), explain(lm, SUM, WRITTEN), explain(base, SUM, WRITTEN)
    for t, s, u in zip(both.tokens, alone.tokens, other.tokens, strict=True):
        assert (t.student, t.top_student) == (s.student, s.top_student)
        assert (t.teacher, t.top_teacher) == (u.teacher, u.top_teacher)
    assert both.sums["mean D"] != pytest.approx(alone.sums["mean D"], rel=0.1)


def test_without_more_it_is_plain_self_distillation_on_the_greedy_answer(lm):
    x = explain(lm, Example("sum", "89+72", "161"))
    assert x.answer == explain(lm, SUM).answer and x.tokens[-1].text == "<|im_end|>" and x.correct is None
    assert all(t.contrast is None and not t.contexts and t.weight == 1.0 for t in x.tokens)
    assert x.sums["loss"] == x.sums["mean D"] == x.sums["weighted mean D"] and "mean contrast" not in x.sums
    assert all(t.student == t.top_student[0][1] for t in x.tokens)  # greedy


@pytest.mark.parametrize("settings", [dict(recipe="sft"), dict(clip_quantile=0.9), dict(context_kind="retrieval")])
def test_what_cannot_be_shown_is_refused(lm, settings):
    with pytest.raises(ValueError, match="--w-div above 0, --clip-quantile 0 and --context-kind random"):
        explain(lm, SUM, WRITTEN, task=TASK, cfg=make(**{"recipe": "agree-token"} | settings))


def test_a_long_answer_is_read_in_pieces(lm):
    text = " ".join(["9+2=12"] * 20)
    x = explain(lm, SUM, text)
    ids = [*lm.tokenizer(text)["input_ids"], lm.eos[0]]
    want = direct(lm, chat_ids(lm.tokenizer, "89+72"), ids)[torch.arange(len(ids)), torch.tensor(ids)].exp()
    assert len(ids) > 128
    torch.testing.assert_close(torch.tensor([t.student for t in x.tokens]), want, rtol=1e-4, atol=1e-6)


def test_a_sampled_answer_depends_on_the_seed_and_on_the_turn(lm):
    prompt, cfg = chat_ids(lm.tokenizer, "89+72"), make("sd")
    draw = lambda turn: command.write(lm, prompt, cfg, temperature=3.0, turn=turn)
    assert draw(1) == draw(1) != draw(2) and len(draw(1)) <= 40


# --- what is known of a question


@pytest.mark.parametrize("family", world.FAMILIES)
@pytest.mark.parametrize("ood", [False, True])
def test_any_question_of_the_world_is_recognised(family, ood):
    r = random.Random(7)
    for _ in range(30):
        item = world.MAKE[family](r, ood, False)
        found = recognise(item.question)
        assert (found.task, found.question, found.reference) == (family, item.question, item.terse)
        assert found.answer == item.answer and found.negative != found.reference
        if family == "code":
            ran = [eval(found.negative, {"x": x}) for x in (1, 3, 10)]
            assert ran != [eval(found.reference, {"x": x}) for x in (1, 3, 10)]
        else:
            verdicts = world.score([found, found], [found.reference, found.negative])
            assert [v["correct"] for v in verdicts] == [True, False] or family == "sum"
        assert recognise(item.question) == found


@pytest.mark.parametrize(
    "question",
    [
        "", "hello", "89-72", "89+72+1", "89+", "1" * 5000 + "+1", "largest: A 4, B 4, C 1", "largest: A 4, B 5", "where is lamp",
        "where is moon: mill, cave, port, barn", "where is lamp: mill, cave, port, barn",  # it is in the forest
        "where is lamp: forest, forest, cave, port", "f: add 3", "f: divide 3 then add 2",
        "f: add 3 then add 2 then add 2 then add 2", "f: add minus 3 4 then",
        "tool: fly rome 2", "tool: swim rome 2 monday", "tool: fly rome oslo 2 monday", "TOOL: fly rome 2 monday",
    ],
)  # fmt: skip
def test_what_is_no_question_of_the_world_is_not(question):
    assert recognise(question) is None


def test_what_is_known_and_what_is_given():
    known = TASK.train[0]
    assert example_of(known.question, TASK) is known  # with its blots
    assert example_of("89+72", TASK).reference == "161" and example_of("89+72", None) is None
    assert example_of(TASK.test[0].question, TASK).reference == TASK.test[0].target  # whole
    mine = example_for("89+72", "about 160", "", TASK)
    assert (mine.reference, mine.negative, mine.answer, mine.task) == ("about 160", "", "161", "sum")
    assert example_for("why?", "so", None, None) == Example("new", "why?", "so")
    file = Task("mine", [Example("t", "why?\n\nAnswer: <x>", "so", negative="no")], [], world.score)
    assert example_for("why?", None, None, file).negative == "no"


def test_a_model_of_the_world_is_known_by_its_vocabulary(lm, tmp_path):
    lm.tokenizer.save_pretrained(tmp_path)
    assert speaks_world(TINY) and speaks_world(tmp_path) and not speaks_world(tmp_path / "none") and not speaks_world("Qwen")
    lm.tokenizer.__class__.from_pretrained(TINY).train_new_from_iterator(["other words"], 300).save_pretrained(tmp_path / "b")
    assert not speaks_world(tmp_path / "b")


# --- how it looks

ODD = "Hé <script>x</script>\n\tlo 😀 中文 \x1b[31m \u202e ' \""


def columns(text):
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("k", [0, 3, 4, 7])
def test_the_table_fits_and_its_columns_stand_below_each_other(lm, width, k):
    cfg = make("sd", w_contrast=0.1, agreement="token" if k else "none", contexts=k, max_new_tokens=99)
    lines = table(explain(lm, SUM, ODD, task=TASK, cfg=cfg), width).splitlines()
    assert max(map(columns, lines)) <= width
    start = next(i for i, line in enumerate(lines) if "student teacher" in line)
    rows = lines[start : lines.index("", start)]
    assert len({columns(row) for row in rows}) == 1 and sum(row.startswith("* ") for row in rows) == 3
    assert ("low" in rows[0], "l4" in rows[0]) == (k > 4, k == 4)
    text = "\n".join(lines)
    assert "\x1b" not in text and "\u202e" not in text and r"\x1b" in text and r"\n" in text


def test_tokens_are_shown_safely():
    assert [printable(s) for s in ("a", " a", "", "\n", "\x1b[0m", "é中")] == ["a", "' a'", "''", r"\n", r"\x1b[0m", "é中"]
    assert printable("é😀", "ascii") == r"\xe9\U0001f600" and printable("\udc80") == r"\udc80"
    assert [fitted(s, 4) for s in ("ab", "abcdef", "中文字", "e\u0301", "é中文")] == ["ab  ", "abc~", "中~ ", "e\u0301   ", "é中~"]
    assert [number(x) for x in (0.1234, 12.347, 123.47, -0.5, -1e-9)] == ["0.123", "12.35", "123.5", "-0.500", "0.000"]


def test_a_part_of_a_character_goes_by_its_name_in_the_vocabulary(lm):
    x = explain(lm, SUM, "é")
    assert [t.text for t in x.tokens] == ["Ã", "©", "<|im_end|>"] and x.answer == "é"
    assert [row[2:].split()[0] for row in table(x).splitlines()[6:9]] == ["Ã", "©", "<|im_end|>"]


def test_colour_is_for_terminals_only(lm, monkeypatch, capsys):
    x = explain(lm, SUM, WRITTEN)
    show(x)
    assert "\033[" not in capsys.readouterr().out
    assert re.sub(r"\033\[[\d;]*m", "", table(x, color=True)) == table(x) and "\033[1;31m2 " in table(x, color=True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, value, painted in (("TERM", "xterm", True), ("NO_COLOR", "", False), ("TERM", "dumb", False)):
        monkeypatch.setenv(name, value)
        show(x)
        assert ("\033[" in capsys.readouterr().out) is painted


def test_a_console_that_knows_ascii_only(command_with, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert command_with("--question", "été?", "--reference", "中", "--answer", ODD, "--max-new-tokens", "99") == 0
    sys.stdout.flush()
    text = raw.getvalue().decode("ascii")
    assert r"\xe9t\xe9?" in text and r"\u4e2d" in text and "loss" in text
    assert sys.stdout.errors == "backslashreplace"  # a token by its number says more than "?"


class Tags(HTMLParser):
    """What a page is made of, and whether what must be closed is."""

    def __init__(self):
        super().__init__()
        self.names, self.attributes, self.open = set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "br", "th", "td"):  # the end of a cell may be left out
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file_and_escapes_all_that_was_written(lm, tmp_path, capsys):
    cfg = make("sd", w_contrast=0.1, agreement="token", max_new_tokens=99)
    evil = Example("new", "<script>alert(1)</script> & $title", "<b>a\x1b</b>\nb", negative='"><img src=x>')
    x = explain(lm, evil, ODD, task=TASK, cfg=cfg)
    file = tmp_path / "a.html"
    show(x, str(file))
    assert f"the page: {file}" in capsys.readouterr().out
    text = file.read_text(encoding="utf-8")
    assert text == html_page(x) and text.startswith("<!doctype html>")
    tags = Tags()
    tags.feed(text)
    assert tags.names == set("html meta title style h1 h2 table tr th td div p span b i br details summary pre".split())
    assert tags.attributes == {"lang", "charset", "name", "content", "class", "style", "tabindex"} and not tags.open
    assert not re.search(r"url\(|@import|https?:", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $title" in text and "<img" not in text
    assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"]
    assert text.count('tabindex="0"') == len(x.tokens) == text.count('class="card"') and text.count(" first") >= 1
    assert text.count('class="top"') == 2 * len(x.tokens) and text.count("--p: ") == 10 * len(x.tokens)
    assert text.count("<details>") == 1 + len(x.prompts) == 7 and f"{x.sums['loss']:.6f}" in text
    assert "prefers-color-scheme: dark" in text


# --- the command


def test_the_command_explains_and_writes_the_page(command_with, capsys, tmp_path):
    file = tmp_path / "a.html"
    assert command_with("89+72", "--html", str(file), "--divergence", "jsd", "--gamma", "2") == 0
    text = capsys.readouterr().out
    assert "reference        161" in text and "wrong answer     9+2=12" in text and "Jensen-Shannon" in text
    assert "gamma 2" in text and file.stat().st_size < 60_000
    assert command_with("--question", "89+72", "--wrong", "", "--contexts", "0", "--answer", "161") == 0
    text = capsys.readouterr().out
    assert "right answer     161" in text and "no contexts" in text and "contrast" not in text


def test_the_references_of_a_run_are_those_it_was_trained_on(command_with, capsys, tmp_path):
    settings = dict(recipe="sd", model="tiny", seed=0, references="faint", wrong_references=0.5)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    plain, seen = world.load(60, 1), world.load(60, 1, wrong_references=0.5, references="faint")
    both = zip(plain.train, seen.train, strict=True)
    example = next(there for here, there in both if there.reference.strip("_ ") and here.reference != there.reference)
    assert command_with(example.question, "--model", str(tmp_path), "--data", "tiny", "--answer", "1", "--contexts", "0") == 0
    assert f"reference        {example.reference}\n" in capsys.readouterr().out


def test_a_file_of_ones_own_gives_references_and_contexts(command_with, capsys, tmp_path):
    file = tmp_path / "mine.jsonl"
    lines = [dict(question=f"why {i}?", reference=f"because of {i}", negative=f"not of {i}") for i in range(8)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert command_with("why 3?", "--data", str(file), "--contexts", "2", "--max-new-tokens", "9") == 0
    text = capsys.readouterr().out
    assert "reference        because of 3" in text and "wrong reference  not of 3" in text and " l2 " in text


def says(monkeypatch, *lines):
    lines = iter(lines)

    def answer(prompt):
        line = next(lines)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", answer)


@pytest.mark.slow
@pytest.mark.parametrize("end", [":q", "", "  ", EOFError, KeyboardInterrupt])
def test_a_talk(command_with, monkeypatch, capsys, end):
    says(monkeypatch, "ref: too early", "89+72", "ref:", "hello there", "ref: 12", "x" * 600, end, "never asked")
    assert command_with() == 0
    out, err = capsys.readouterr()
    assert out.count("ask something first, then give a text: `ref: TEXT`") == 2
    assert out.count("student teacher") == 2 and out.count("reference        161") == 1 and err == ""
    assert "question         hello there\nreference        12\n" in out and "exceed the model's context" in out


def test_another_reference_in_a_talk_changes_nothing_else(command_with, monkeypatch, capsys):
    says(monkeypatch, "89+72", "ref: 99", ":q")
    assert command_with() == 0
    out = capsys.readouterr().out
    assert out.count("wrong answer     9+2=12") == 2 and out.count("wrong reference  172") == 2 and "reference        99\n" in out


def test_a_divergence_of_ones_own_has_its_own_name():
    x = SimpleNamespace(cfg=make("sd"), tokens=[SimpleNamespace(contexts=[], div=0.5)])
    x.cfg.divergence = "hellinger"
    assert columns_of(x)[0][1] == "hellinger"


def test_a_line_with_a_context_or_code_is_found_by_its_question():
    ask = "Context: the sky of Mars.\n\nWhat colour is it?\n\nEnd with one line."
    task = SimpleNamespace(name="mine", train=[Example("mine", ask, "red")], test=[])
    assert example_of(ask, task).reference == "red"
    assert example_of("What colour is it?", task).reference == "red" and not example_of("What", task)


def test_a_talk_with_another_model_has_no_references(command_with, monkeypatch, capsys):
    says(monkeypatch, "89+72", ":q")
    monkeypatch.setattr("engine.asking.speaks_world", lambda folder: False)
    assert command_with("--max-new-tokens", "9") == 0
    assert "student teacher" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["hello"], "'hello' is no question of tiny (explain.py --help shows some): --reference is needed"),
        (["--question", " "], "--question is empty"),
        (["89+72", "--answer", ""], "--answer is empty"),
        (["89+72", "--reference", " "], "--reference is empty"),
        (["--reference", "161"], "belong to a question: add --question"),
        (["89+72", "--model", "no/such"], "--reference is needed"),
        (["89+72", "--reference", "161", "--model", "./none"], "--model ./none: there is no folder ./none"),
        (["89+72", "--base", "./none"], "--base ./none: there is no folder"),
        (["89+72", "--reference", "161", "--model", "no/such", "--contexts", "3"], "--contexts 3 needs solved examples"),
        (["89+72", "--contexts", "1"], "--contexts 1 with --agreement token"),
        (["89+72", "--contexts", "-1"], "--contexts -1 is negative"),
        (["89+72", "--contexts", "x"], "argument --contexts: invalid int value: 'x'"),
        (["89+72", "--gamma", "-1"], "--gamma -1.0 is negative"),
        (["89+72", "--margin", "nan"], "--margin is nan"),
        (["89+72", "--temperature", "-1"], "--temperature -1.0 must be 0 (greedy) or more"),
        (["89+72", "--temperature", "inf"], "--temperature inf must be"),
        (["89+72", "--divergence", "kl"], "argument --divergence: invalid choice: 'kl'"),
        (["89+72", "--divergence", "jsd", "--alpha", "1"], "--alpha 1.0 must lie strictly between 0 and 1"),
        (["89+72", "--data", "none.jsonl"], "none.jsonl"),
        (["89+72", "--data", "nonsense"], "nonsense"),
        (["89+72", "--device", "quantum"], "--device quantum does not exist"),
        (["89+72", "--nonsense", "1"], "unrecognized arguments: --nonsense 1"),
        (["89+72", "--answer", "1 " * 30], "the answer has 61 tokens: raise --max-new-tokens, which is 40"),
        (["89+72", "--max-new-tokens", "600"], "600"),
        (["x " * 400, "--reference", "y"], "exceed the model's context"),
        (["x " * 400, "--reference", "y", "--answer", "z"], "lower --max-new-tokens"),
        (["89+72", "--html", "no/such/folder/a.html"], "--html no/such/folder/a.html: No such file or directory"),
    ],
)
def test_refusals_are_one_line_and_code_2(argv, message, lm, monkeypatch, capsys):
    monkeypatch.setattr("engine.asking.load", lambda name, device: lm if name == "tiny" else load(name, device))
    monkeypatch.setattr(Config, "train_size", 20)
    try:
        code = command.main(argv if "--device" in argv else [*argv, "--device", "cpu"])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("explain.py: ") and err.count("\n") == 1 and message in err, err


def test_a_base_with_other_tokens_is_refused(lm, monkeypatch, capsys):
    other = load("tiny", CPU)
    other.tokenizer.add_tokens(["<new>"])
    monkeypatch.setattr("engine.loading.load", lambda name, device: other)
    assert command.main(["89+72", "--base", "other", "--device", "cpu"]) == 2
    assert f"--base {other.name} has another tokenizer than --model {lm.name}" in capsys.readouterr().err


def test_a_stop_and_a_full_device_are_one_line(lm, monkeypatch, capsys):
    monkeypatch.setattr("engine.asking.load", lambda name, device: lm)
    monkeypatch.setattr(Config, "train_size", 20)
    for error, code, message in ((KeyboardInterrupt, 130, "stopped"), (torch.OutOfMemoryError, 2, "lower --max-new-tokens")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(command, "write", fail)
        assert command.main(["89+72", "--device", "cpu"]) == code
        assert message in capsys.readouterr().err


def test_help_shows_every_default_and_the_questions_it_knows(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], "what it is")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "(default: 0.01; tiny world: 1.0)" in text and "(default: 3 with --data" in text
    shown = re.findall(r'"([^"]+)"', text)
    assert len(shown) == 5 and [recognise(q).task for q in shown] == ["sum", "choice", "fact", "code", "tool"]


def test_the_docs_show_what_is_printed(lm, monkeypatch, capsys):
    shown = (Path(command.__file__).parent / "docs" / "explain.md").read_text(encoding="utf-8").split("```")[3].strip()
    monkeypatch.setenv("COLUMNS", "100")  # what is printed depends on the terminal's width
    monkeypatch.setattr("engine.asking.load", lambda name, device: lm)
    assert command.main(["89+72", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.strip()
    decimal = r"-?\d+\.\d+"  # other processors round differently
    assert re.sub(decimal, "#", printed).split() == re.sub(decimal, "#", shown).split()
    close = zip(re.findall(decimal, printed), re.findall(decimal, shown), strict=True)
    assert all(float(a) == pytest.approx(float(b), abs=0.011) for a, b in close)


@pytest.mark.skipif(os.name == "nt", reason="pipes end otherwise there")
def test_a_reader_who_has_seen_enough_is_no_error(lm, monkeypatch, capfd):
    monkeypatch.setattr("engine.asking.load", lambda name, device: lm)
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert command.main(["89+72", "--contexts", "0", "--device", "cpu"]) == 0
    assert capfd.readouterr().err == ""
