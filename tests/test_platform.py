"""Windows and macOS, as far as Linux can play them: no fork(), no resource, fcntl or prctl, a console of few characters."""

import io
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from tqdm import tqdm

from engine import any_console
from engine.page import has_colour
from engine.watch import sample
from tasks import sandbox, subprocess_judge
from tasks.data import Example
from tasks.sandbox import Limits, Verdict, run_tests

ROOT = Path(__file__).parents[1]
QUICK = Limits(wall_seconds=1.5, cpu_seconds=1, memory_mb=256)
PASSED = Verdict(True, "passed")
F, T = "def f(x): return x + 7\n", ["assert f(1) == 8"]
SHOUT = """
import os
def f(x):
    for fd in range(64):
        for line in b'[true, "passed"]', b'[null, true, ["list", null]]', b'[null, null, ["list", null]]', b'passed':
            try: os.write(fd, line + b'\\n')
            except OSError: pass
    return 0
"""
EQUAL = "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()"
JUDGED = {  # name: (program, how the reason begins, its tests if they are not the usual ones)
    "right": (F, "passed"),
    "prints, and is right": ("print('x' * 10**6)\n" + F, "passed"),
    "changes a list in place": ("def f(x): x.sort()", "passed", "x = [2, 1]\nf(x)\nassert x == [1, 2]"),
    "called like a builtin": ("def sum(a, b): return a + b", "passed", "assert sum(1, 2) == 3"),
    "reads its own folder only": ("import os\nassert os.listdir() == []\n" + F, "passed"),
    "wrong": ("def f(x): return 3", r"assertion failed: assert f\(1\) == 8"),
    "raises": ("def f(x): return 1 / 0", "error: ZeroDivisionError: division by zero"),
    "syntax error": ("def f(x) return 8", "error: SyntaxError"),
    "no tests": (F, "no tests", ""),
    "endless": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "timeout"),
    "asleep": ("import time\ntime.sleep(60)", "timeout"),
    "keeps the judge busy": ("def f(x): return range(10**13)", "timeout", "sum(f(1))"),
    "exits with 0": ("import sys\nsys.exit(0)", "exited early"),
    "exits with 0 at once, when called": ("import os\ndef f(x): os._exit(0)", "exited early"),
    "exits, and the test catches all": (
        "import os\ndef f(x): os._exit(0)", "exited early", "try:\n    f(1)\nexcept BaseException: pass",
    ),
    "prints passed": ("print('passed', flush=True)\nprint('[true, \"passed\"]', flush=True)\ndef f(x): return 3", "assertion"),
    "writes verdicts everywhere": (SHOUT, "error|assertion"),
    "equals everything": (EQUAL, "error: TypeError: a A is not plain data"),
    "aborts": ("import os\nos.abort()", "killed|exited early"),
}  # fmt: skip


@pytest.fixture
def bare(monkeypatch):
    monkeypatch.setattr(sandbox, "ISOLATES", False)
    warnings.simplefilter("ignore")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("asleep", "endless", "keeps the judge busy"))) for n in JUDGED]
)
def test_a_verdict_without_isolation(bare, name):
    source, reason, *tests = JUDGED[name]
    verdict = run_tests([(source, tests or T)], QUICK)[0]
    assert verdict.passed == (reason == "passed") and re.match(reason, verdict.reason), verdict
    assert len(verdict.reason) <= 200 and verdict.reason.isprintable()


@pytest.mark.slow
@pytest.mark.skipif(not sandbox.ISOLATES, reason="nothing to compare with")
def test_the_verdicts_are_those_of_the_isolated_path(bare, monkeypatch):
    waited_for, differ = {"asleep", "endless", "keeps the judge busy"}, {"writes verdicts everywhere", "aborts"}
    names = [n for n in JUDGED if n not in waited_for | differ]
    jobs = [(JUDGED[n][0], list(JUDGED[n][2:]) or T) for n in names]
    without = run_tests(jobs, QUICK)
    monkeypatch.setattr(sandbox, "ISOLATES", True)
    assert dict(zip(names, without, strict=True)) == dict(zip(names, run_tests(jobs, QUICK), strict=True))


def test_order_and_one_line(monkeypatch):
    monkeypatch.setattr(sandbox, "ISOLATES", False)
    subprocess_judge._warn.cache_clear()
    jobs = [(f"import time\ntime.sleep({i % 3 / 9})\ndef f(x): return {i}", ["assert f(0) % 2 == 0"]) for i in range(4)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert [v.passed for v in run_tests(jobs)] == [True, False] * 2
        assert run_tests([]) == []
    assert ["no isolation here" in str(w.message) and "\n" not in str(w.message) for w in told] == [True]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes as Linux shows them")
def test_what_a_program_started_ends_with_it(bare, tmp_path):
    """Also where the program itself has ended, well or badly."""
    for end in ("", "while True: pass", "os._exit(0)"):
        found = tmp_path / f"pid{len(end)}"
        code = "import os, subprocess, sys\np = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        run_tests([(code + f"open({str(found)!r}, 'w').write(str(p.pid))\n{end}\n" + F, T)], QUICK)
        process = Path("/proc") / found.read_text()
        last = time.monotonic() + 5
        while process.exists() and "\nState:\tZ" not in (process / "status").read_text():
            assert time.monotonic() < last, end
            time.sleep(0.02)


# --- a process that plays such a machine -----------------------------------------------------------------------------

# What libraries of Linux want to import is there before it is taken away from ours.
ELSEWHERE = """
import os, signal, sys
{first}
for name in "fork forkpty setsid getuid geteuid getgid killpg getpgid chown getloadavg".split():
    vars(os).pop(name, None)
for name in "SIGALRM setitimer pthread_sigmask SIGXCPU alarm".split():
    vars(signal).pop(name, None)
for name in "resource fcntl pwd grp termios".split():
    sys.modules[name] = None  # its import fails
import ctypes
ctypes.CDLL, real = lambda name, *a, **k: object() if name is None else real(name, *a, **k), ctypes.CDLL  # no prctl
"""


def elsewhere(code, encoding="cp1252", first=""):
    """Run this in a process without all that, in the repository, with a console of that encoding."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONUTF8", "LC_ALL", "LANG")}
    env |= {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    code = ELSEWHERE.format(first=first) + code
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, check=False)


def test_a_verdict_in_such_a_process():
    code = f"from tasks.sandbox import *\nprint(ISOLATES, [v.passed for v in run_tests([({F!r}, {T!r}), ('', {T!r})])])"
    done = elsewhere(code + f"\nrun_tests([({F!r}, {T!r})])")
    assert done.stdout.split() == b"False [True, False]".split(), done
    assert done.stderr.count(b"no isolation here") == 1


@pytest.mark.slow
def test_a_run_from_end_to_end_in_such_a_process(tmp_path):
    flags = f"--steps 1 --batch 4 --micro-batch 4 --train-size 40 --eval-size 10 --sample-every 1 --out {tmp_path / 'run'}"
    code = f"import runpy\nsys.argv = ['train.py', *{flags.split()!r}]\nrunpy.run_path('train.py', run_name='__main__')"
    done = elsewhere(code, "ascii", "import datasets, torch, transformers.generation.utils")
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert (tmp_path / "run" / "summary.json").exists() and (tmp_path / "run" / "model.safetensors").exists()
    assert done.stderr.count(b"train.py: no isolation here") == 1
    assert b"ceiling" in done.stdout and b"Traceback" not in done.stderr


# --- a console of few characters -------------------------------------------------------------------------------------

SAMPLE = """
from tqdm import tqdm
bar = tqdm(total=2, desc="caf\\u00e9 \\U0001f600")
bar.update()
bar.set_postfix(loss="\\u2212 0.1 \\u2192")
bar.write("step 1: what is \\U0001f600?  ->  \\u4e2d\\u6587 \\u2192 caf\\u00e9 \\ud83d")
bar.close()
print("\\u03c0 \\u2192 \\U0001f600 done")
"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_no_character_ends_a_run(encoding):
    done = elsewhere("from engine import any_console\nany_console()" + SAMPLE, encoding)
    shown = done.stdout.decode(encoding)
    assert done.returncode == 0 and "done" in shown and "what is" in shown, done.stderr
    assert ("\U0001f600 done" in shown) == (encoding == "utf-8") and ("caf\xe9" in shown) == (encoding != "ascii")
    assert b"1/2" in done.stderr


def test_a_sample_is_printed_on_a_stream_that_nobody_has_prepared(monkeypatch):
    """Called from Python, with another stream in the place of stdout: what it lacks is replaced where the sample is made."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    print(sample(1, Example("sum", "what is \U0001f600?", "caf\u00e9 \u2192"), "\u4e2d", None, 60), flush=True)
    shown = console.buffer.getvalue().decode("cp1252")
    assert "what is ??" in shown and "caf\u00e9 ?" in shown


def test_a_closed_terminal_ends_no_run(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as `>&-` leaves it
    any_console()
    tqdm.write("a sample")
    assert not has_colour()


def test_it_would_end_without():
    assert b"UnicodeEncodeError" in elsewhere("print('\\U0001f600')", "cp1252").stderr


def test_streams_without_an_encoding_are_left_alone(monkeypatch):
    for stream in (None, object()):
        monkeypatch.setattr(sys, "stdout", stream)
        any_console()
