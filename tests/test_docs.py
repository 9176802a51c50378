"""What docs/ says is true: quoted lines stand where it says, commands print what it shows, the exercises' patches work.

After an edit of the code, `python tests/test_docs.py` puts right the line numbers of docs/equations.md, the lengths of the files
in docs/reading.md and the length of the core in README.md.
"""

import ast
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from conftest import in_process
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it has no conftest.py

from tasks import world
from tasks.data import chat_ids
from tasks.tiny import ASSET

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FOLDERS = ("engine", "tasks", "experiments")
PAGES = {p.name: p.read_text() for p in sorted(DOCS.glob("*.md"))}
READMES = {f"{name}/README.md": (ROOT / name / "README.md").read_text() for name in FOLDERS}
ALL = PAGES | READMES | {name: (ROOT / name).read_text() for name in ("README.md", "CHANGELOG.md")}
MODULES = {p.stem: p.read_text() for p in (*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py")))}
CORE = ("losses", "agreement", "ema", "unisd")
# [`ema.py:54`](../ema.py#L54) | `code` |
QUOTED = re.compile(r"\[`((?:\w+/)?\w+\.py):\d+`\]\(\.\./(?:\w+/)?\w+\.py#L\d+\) \| `(.+?)` \|")
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
each = pytest.mark.parametrize("page", ALL)


@pytest.fixture(scope="module")
def lm():
    """The embedded model by transformers alone: .model, .tokenizer."""
    return SimpleNamespace(model=AutoModelForCausalLM.from_pretrained(ASSET).eval(), tokenizer=AutoTokenizer.from_pretrained(ASSET))


def outside_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchor(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path):
    return {anchor(h) for h in re.findall(r"^#+ (.+)$", outside_code(path.read_text()), re.MULTILINE)}


# --- links and names -------------------------------------------------------------------------------------------------


def folder_of(page):
    return DOCS if page in PAGES else (ROOT / page).parent


@each
def test_every_link_leads_somewhere(page):
    for target, _, place in (t.partition("#") for t in re.findall(r"\]\((?!http)([^)]+)\)", outside_code(ALL[page]))):
        path = folder_of(page) / (target or Path(page).name)
        assert path.exists(), f"{page}: {target}"
        if path.suffix == ".md" and place:
            assert place in anchors(path), f"{page}: {target}#{place} is no heading; there are {sorted(anchors(path))}"


@each
def test_every_page_can_be_found(page):
    """From the README, or from a page that the README links."""
    if page in PAGES:
        linked = "".join(text for name, text in ALL.items() if name != page)
        assert re.search(rf"\]\((?:docs/|\.\./docs/)?{re.escape(page)}[#)]", linked), f"no page links {page}"


@each
def test_every_named_function_and_test_exists(page):
    text = outside_code(ALL[page])
    for module, name in re.findall(r"`(\w+)\.([A-Za-z_]\w*)(?:\.\w+)?`", text):
        if page != "CHANGELOG.md" and module in MODULES and name not in ("py", "json", "md", "html"):
            known = re.search(rf"^(?:    )?(?:def|class) {name}\b|^{name}\b", MODULES[module], re.MULTILINE)
            assert known, f"{page}: {module}.{name}"
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {name}(" in tests, f"{page}: {name}"


@each
def test_every_named_file_exists(page):
    """`head.py` in a folder's own README, `engine/head.py` everywhere else, so that a reader finds it."""
    if page == "CHANGELOG.md":
        return  # it names what is gone
    for name in set(re.findall(r"`((?:\w+/)*\w+\.py)`", outside_code(ALL[page]))):
        if name.startswith(("src/", "scripts/", "trl/")):
            continue  # a file of another project
        made = f"+++ b/{name}\n" in ALL[page]  # by a patch of the page
        assert made or (ROOT / name).exists() or (folder_of(page) / name).exists(), f"{page}: {name}"


@each
def test_no_placeholder_is_left(page):
    assert not re.findall(r"@[A-Z_]+@", ALL[page]), page


# --- lengths ----------------------------------------------------------------------------------------------------------

LENGTH = re.compile(r"\| `((?:\w+/)?\w+\.py)` \| (\d+) \|")
CORE_LENGTH = re.compile(r"a core of (\d+) lines")


def length(path):
    return (ROOT / path).read_text().count("\n")


def about(said, actual):
    return abs(actual - int(said)) <= max(5, 0.1 * actual)


@pytest.mark.parametrize(("name", "lines"), LENGTH.findall(PAGES["reading.md"]))
def test_line_counts_are_about_right(name, lines):
    assert about(lines, length(name)), f"{name} has {length(name)} lines, docs/reading.md says {lines}"


def test_every_file_in_sight_is_in_the_reading_order_and_the_core_is_as_long_as_the_readme_says():
    assert {p.name for p in ROOT.glob("*.py")} == {name for name, _ in LENGTH.findall(PAGES["reading.md"])}
    (said,) = CORE_LENGTH.findall(ALL["README.md"])
    assert about(said, sum(length(f"{name}.py") for name in CORE)), "run: python tests/test_docs.py"


# --- equations -------------------------------------------------------------------------------------------------------


def refreshed(text):
    """The page with every quoted line's present number. Raises AssertionError if a line is gone, or stands there twice."""

    def now(match):
        file, code = match[1], match[2]
        lines = (ROOT / file).read_text().splitlines()
        at = [i for i, line in enumerate(lines, 1) if re.fullmatch(re.escape(code) + r"(\s+#.*)?", line.strip())]
        assert len(at) == 1, f"docs/equations.md quotes a line that {file} has {len(at)} times: {code}"
        return f"[`{file}:{at[0]}`](../{file}#L{at[0]}) | `{code}` |"

    return QUOTED.sub(now, text)


def test_every_quoted_line_stands_at_its_number():
    page = PAGES["equations.md"]
    assert len(QUOTED.findall(page)) == page.count("](../")  # no row escapes the pattern
    wrong = [(a, b) for a, b in zip(page.splitlines(), refreshed(page).splitlines(), strict=True) if a != b]
    assert not wrong, "\n".join([f"{a}\n  should be\n{b}" for a, b in wrong] + ["run: python tests/test_docs.py"])


def test_every_equation_of_the_paper_is_there():
    headings = " ".join(re.findall(r"^## (.+)$", PAGES["equations.md"], re.MULTILINE))
    assert re.findall(r"\((\d)\)", headings) == list("123456789")


# --- commands with their output --------------------------------------------------------------------------------------

SHOWN = re.findall(r"```bash\n(.+?)\n```\n\n```text\n(.+?)\n```", PAGES["differences.md"], re.DOTALL)


def same(got, shown):
    """Equal texts, numbers equal up to 2 in the last digit shown: other processors round differently."""
    number = r"-?\d+(?:\.\d+)?"
    assert re.sub(number, "#", got) == re.sub(number, "#", shown), f"{got}\n  shown is\n{shown}"
    for a, b in zip(re.findall(number, got), re.findall(number, shown), strict=True):
        assert abs(float(a) - float(b)) <= 2.1 * 10 ** -len(b.partition(".")[2]) * ("." in b), f"{got}\n  shown is\n{shown}"


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=range(1, len(SHOWN) + 1))
def test_a_command_prints_what_is_shown(command, output, monkeypatch):
    """In this process: importing torch a dozen times would be most of the time."""
    assert "\n" not in command
    program, *rest = shlex.split(command)
    assert program == "python"
    if rest[0] == "-c":
        assert len(rest) == 2
        monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
        with redirect_stdout(StringIO()) as said:
            exec(rest[1], {"__name__": "__main__"})
        same(said.getvalue().strip(), output)
    else:
        _, out, err = in_process(ROOT, *rest)
        same((out + err).strip(), output)


def test_every_difference_has_its_command_and_its_test():
    parts = re.split(r"^## ", PAGES["differences.md"], flags=re.MULTILINE)[1:]
    numbered = [p for p in parts if re.match(r"\d+\. ", p)]
    assert [int(p.split(".")[0]) for p in numbered] == list(range(1, len(SHOWN) + 1))
    for part in numbered:
        assert "```bash\n" in part and re.search(r"Tests?: ", part), part.splitlines()[0]


# --- flags -----------------------------------------------------------------------------------------------------------


def test_flags_exist_with_these_defaults_and_none_is_missing():
    from engine.config import Config

    ours = {f.name: f.default for f in fields(Config)}
    parts = re.split(r"^## ", PAGES["flags.md"], flags=re.MULTILINE)[1:]
    named = set()
    for part in parts:
        column = 0 if part.startswith("Ours alone") else 2
        rows = [re.split(r" ?\| ?", line.strip("| ")) for line in part.splitlines() if line.startswith("| ")][1:]
        for cells in rows:
            for flag, default in re.findall(r"`--([a-z-]+)`(?: ([^\s:,;|*(]+))?", cells[column]):
                name = flag.replace("-", "_")
                assert name in ours, f"flags.md: --{flag} does not exist"
                named.add(name)
                if default:
                    value = ours[name]
                    shown = float(default) if type(value) in (int, float) else default
                    assert shown == (str(value).lower() if type(value) is bool else value), f"--{flag} {default}"
    assert named == ours.keys(), f"not named in flags.md: {sorted(ours.keys() - named)}"


# --- glossary --------------------------------------------------------------------------------------------------------


def test_the_glossary_is_in_order_and_says_where():
    entries = re.findall(r"^- \*\*(.+?)\*\* \(\[`(.+?)`\]\(\.\./(.+?)\)\): (.+)$", PAGES["glossary.md"], re.MULTILINE)
    assert len(entries) == len(re.findall(r"^- ", PAGES["glossary.md"], re.MULTILINE)) >= 35
    terms = [e[0].casefold() for e in entries]
    assert terms == sorted(terms) and len(set(terms)) == len(terms)
    for term, shown, target, text in entries:
        assert shown == target and (ROOT / target).exists(), term
        sentences = re.findall(r"\.(?:\s|$)", text.replace("eq. ", ""))
        assert 1 <= len(sentences) <= 2, f"{term}: one or two sentences, not {len(sentences)}"


# --- exercises -------------------------------------------------------------------------------------------------------

EXERCISES = re.split(r"^## ", PAGES["exercises.md"], flags=re.MULTILINE)[1:]


def patched(tmp_path):
    """A copy of the project with all patches in it. Each must fit the code as it is, and they must not touch. -> their tests"""
    env = ENV | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}  # a repository further up is none of ours
    leave = shutil.ignore_patterns(".*", "__pycache__", "runs", "results", "notebooks", "golden", "fixtures")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=leave)
    patches, tests = [], []
    for exercise in EXERCISES:
        title, diff = exercise.splitlines()[0], "\n".join(re.findall(r"```diff\n(.*?)```", exercise, re.DOTALL))
        found = re.findall(r"^python -m pytest -q (.+)$", exercise, re.MULTILINE)
        assert diff and len(found) == 1, title
        tests += shlex.split(found[0])
        patches.append((title, diff))

    def apply(diff, *how):
        how = dict(args=["git", "apply", *how], cwd=tmp_path / "copy", env=env)
        return subprocess.run(**how, input=diff, capture_output=True, text=True, check=False)

    for title, diff in patches:
        done = apply(diff, "--check")
        assert done.returncode == 0, f"{title}: {done.stderr}"
    for title, diff in patches:
        before = {p: p.read_bytes() for p in (tmp_path / "copy").rglob("*.py")}
        done = apply(diff)
        assert done.returncode == 0 and any(p.read_bytes() != b for p, b in before.items()), f"{title}: {done.stderr}"
    return tests


def test_the_exercises_patches_apply_alone_and_together(tmp_path):
    assert len(patched(tmp_path)) >= len(EXERCISES) >= 4


@pytest.mark.slow
def test_the_exercises_tests_pass_with_all_patches(tmp_path):
    """All patches in one copy, one pytest for all their tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *patched(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path / "copy", env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_small_and_shown_once_with_a_text():
    shown = [(page, *found) for page in ALL for found in re.findall(r"!\[(.+?)\]\((?:docs/)?figures/([\w-]+\.\w+)\)", ALL[page])]
    shown = [(page, text, name) for page, text, name in shown if (DOCS / "figures" / name).exists()]
    files = {p.name: p.read_bytes() for p in (DOCS / "figures").iterdir()}
    assert {name for _, _, name in shown} == files.keys() and len(shown) == len(files)
    for _, text, name in shown:
        assert len(text) > 40, f"{name}: the text for those who cannot see it"
        assert len(files[name]) <= 60_000
        assert name == "idea.svg" or struct.unpack(">I", files[name][16:20])[0] >= 400


def drawn():
    """docs/figures/idea.svg -> {id of a group: its lines of text}"""
    space = "{http://www.w3.org/2000/svg}"
    groups = ElementTree.parse(DOCS / "figures/idea.svg").getroot().iter(f"{space}g")
    return {group.get("id"): [text.text for text in group.iter(f"{space}text")] for group in groups if group.get("id")}


def test_what_the_picture_says_is_what_the_model_says(lm):
    """The answer in docs/figures/idea.svg is the untouched model's, and so are the words and probabilities of its readings."""
    picture = drawn()
    question, (_, start, answer, _) = " ".join(picture["question"][1:3]), picture["answer"]

    def rows(prompt, answer):  # -> probabilities of the token after each token of the answer, the prompt's last included
        ids = chat_ids(lm.tokenizer, prompt)
        tokens = torch.tensor([ids + lm.tokenizer(answer, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            return tokens[0, len(ids) :], lm.model(tokens).logits[0, len(ids) - 1 :].softmax(-1)

    example = next(e for e in world.load(200, 1).train if e.question == question)
    ids, said = rows(question, f"{start} {answer}")
    assert said[:-1].argmax(-1).tolist() == ids.tolist()  # greedy
    hinted = f"{question}\nhint: {example.reference}"
    demo = "example: where is hare: temple, barn, bridge, market\nanswer: the hare is in the market\nnow: "
    prompts = {"student": question, "teacher": hinted, "contexts": demo + hinted, "misled": f"{question}\nhint: {example.negative}"}
    expected = (answer, example.reference, example.reference, example.negative)
    for (name, prompt), likeliest in zip(prompts.items(), expected, strict=True):
        _, below, shown = picture[name]
        word, p = shown.split()
        best = rows(prompt, start)[1][-1].max(0)
        assert word == likeliest == lm.tokenizer.decode(best.indices).strip(), name
        assert abs(best.values.item() - float(p)) < 0.02, f"{name}: {word} {best.values.item():.3f}"
        assert f"({word})" in below or name in ("student", "contexts")  # the reference that it has


def test_what_notebook_8_breaks_is_in_the_table_and_what_it_draws_on_the_page():
    """Every run of the notebook is a row of docs/troubleshooting.md, every setting of it a flag there, every figure shown."""
    notebook = json.loads((ROOT / "notebooks/08_when_it_goes_wrong.ipynb").read_text())
    source = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    runs = ast.literal_eval(re.search(r"^RUNS = (\{.*?^\})", source, re.MULTILINE | re.DOTALL)[1])
    table = PAGES["troubleshooting.md"].split("\n## ")[0]
    assert len(re.findall(r"^\|", table, re.MULTILINE)) - 2 == len(runs)
    for name, (recipe, overrides) in runs.items():
        assert recipe == "sd" or f"--recipe {recipe}" in table, name
        for key, value in overrides.items():
            flag = f"--{key.replace('_', '-')} {value if isinstance(value, str) else f'{value:g}'}"
            assert re.search(re.escape(flag) + r"[ `,]", table), f"{name}: {flag}"
    shown = re.findall(r"\(figures/(\w+)\.png\)", PAGES["troubleshooting.md"])
    assert shown == re.findall(r'^picture\("(\w+)"\)', source, re.MULTILINE)


if __name__ == "__main__":
    (DOCS / "equations.md").write_text(refreshed(PAGES["equations.md"]))
    lengths = LENGTH.sub(lambda row: f"| `{row[1]}` | {length(row[1])} |", PAGES["reading.md"])
    (DOCS / "reading.md").write_text(lengths)
    core = f"a core of {sum(length(f'{name}.py') for name in CORE)} lines"
    (ROOT / "README.md").write_text(CORE_LENGTH.sub(core, ALL["README.md"]))
