"""Every notebook keeps the format, and runs from a clean state: no network, no git, nothing written beside it.

They are executed in a copy of the project, two at a time, once for the whole file; each test then looks at its own
notebook's result.
"""

import ast
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need jupyter: pip install jupyter")
nbclient = pytest.importorskip("nbclient", reason="notebooks need jupyter: pip install jupyter")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
TIMEOUT = 300  # seconds, of one cell; the longest trains for about a minute
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs")
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells(path, kind="code"):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == kind]


def plain(source):
    """A cell without its magics (%matplotlib inline), so that it can be parsed."""
    return "\n".join("pass" if line.startswith(("%", "!")) else line for line in source.splitlines())


def asserts(tree):
    return any(isinstance(node, ast.Assert) for node in ast.walk(tree))


def shape(cell):
    """What a cell shows: is there text, and which other outputs, in order. How a stream is cut into pieces is a matter of
    timing, and a warning on stderr of the machine."""
    text = any(o.output_type == "stream" and o.name == "stdout" for o in cell.outputs)
    return text, [(o.output_type, "image/png" in o.data) for o in cell.outputs if "data" in o]


def public_functions():
    """name -> the file it is defined in, over the top-level files and the three folders of code."""
    folders = (ROOT, ROOT / "engine", ROOT / "tasks", ROOT / "experiments")
    return {
        node.name: str(file.relative_to(ROOT))
        for folder in folders
        for file in sorted(folder.glob("*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def texts(output):
    """Everything readable in one output; pictures are left out, as base64 may spell anything."""
    if output.output_type == "stream":
        return [output.text]
    if output.output_type == "error":
        return [output.ename, output.evalue, *output.traceback]
    return [str(v) for k, v in output.data.items() if k.startswith("text/")]


def files(folder):
    """path -> size and time of the last change, without what Python itself leaves behind."""
    found = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """-> {name: the executed notebook, or the error that stopped it}, what was written into the project."""
    project = tmp_path_factory.mktemp("clean") / "project"
    shutil.copytree(ROOT, project, ignore=LEFT_OUT)
    own = tmp_path_factory.mktemp("jupyter")  # the kernels' history and connection files: not the user's own
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",  # so a notebook that shows pictures must ask for them: %matplotlib inline
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(own / "ipython"),
    }

    def run(path):
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        where = {"metadata": {"path": str(project / "notebooks")}}
        try:  # each has a kernel, that is, a process, of its own
            nbclient.NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources=where).execute(env=env)
        except (nbclient.exceptions.CellExecutionError, TimeoutError, RuntimeError) as error:
            return error
        return notebook

    before = files(project)
    with ThreadPoolExecutor(2) as pool:
        done = dict(zip([p.stem for p in NOTEBOOKS], pool.map(run, NOTEBOOKS), strict=True))
    after = files(project)
    return done, sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


def test_the_notebooks_are_there_and_numbered_without_a_gap():
    assert NOTEBOOKS
    assert [int(p.stem[:2]) for p in NOTEBOOKS] == list(range(1, len(NOTEBOOKS) + 1))


@each
def test_it_is_short_and_its_lines_are_narrow(path):
    notebook = nbformat.read(path, 4)
    assert len(notebook.cells) <= 25
    wide = [line for c in cells(path) for line in c.source.splitlines() if len(line) > 90]
    assert not wide, wide
    assert path.stat().st_size < 600_000


@each
def test_its_first_code_cell_says_versions_and_device_and_its_last_asserts(path):
    first, *_, last = cells(path)
    said = "".join(t for o in first.outputs for t in texts(o))
    assert "torch" in said and re.search(r"\d+\.\d+", said) and re.search(r"\b(cpu|cuda|mps)\b", said), said
    assert asserts(ast.parse(plain(last.source)))


@each
def test_its_outputs_are_there_and_clean(path):
    for cell in cells(path):
        tree = ast.parse(plain(cell.source))
        silent = isinstance(tree.body[-1], ast.FunctionDef | ast.ClassDef) or asserts(tree)
        assert cell.outputs or silent, f"no output: {cell.source[:80]}"
        assert cell.execution_count, f"never executed: {cell.source[:80]}"
        assert "execution" not in cell.metadata, "execution times change with every run: strip them"
        for output in cell.outputs:
            assert output.output_type != "error"
            for text in texts(output):
                assert not re.search(r"(?<![\w.])/(work|tmp|home|root|Users|opt|usr|mnt)/", text), text[:300]
    assert [c.execution_count for c in cells(path)] == list(range(1, len(cells(path)) + 1)), "not run from top to bottom"


@each
def test_it_has_exercises_with_hidden_solutions(path):
    written = "\n".join(c.source for c in cells(path, "markdown"))
    _, _, exercises = written.rpartition("## Exercises")
    assert exercises.count("<details>") >= 3 and exercises.count("<details>") == exercises.count("</details>")


@each
def test_it_defines_no_function_that_a_file_has(path):
    """Copies drift. Notebook 7 is the exception: writing the functions again, in NumPy, is its subject."""
    ours = public_functions()
    defined = {node.name for c in cells(path) for node in ast.parse(plain(c.source)).body if isinstance(node, ast.FunctionDef)}
    if not path.stem.startswith("07"):
        assert not defined & ours.keys(), {name: ours[name] for name in defined & ours.keys()}


@pytest.mark.slow
@each
def test_it_runs_and_makes_as_many_outputs_as_are_committed(path, executed):
    """Numbers may differ in their last digits from one machine to another; what a cell shows may not."""
    result = executed[0][path.stem]
    if isinstance(result, Exception):
        pytest.fail(f"{path.name}\n{result}"[-3000:])
    again = [c for c in result.cells if c.cell_type == "code"]
    for ours, theirs in zip(cells(path), again, strict=True):
        assert shape(ours) == shape(theirs), f"committed and again differ: {ours.source[:80]}"


@pytest.mark.slow
def test_running_them_writes_nothing_into_the_project(executed):
    assert executed[1] == []
