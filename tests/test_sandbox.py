"""sandbox.py survives every nasty program below, gives honest ones their due, and says the truth about this machine.

All attacks run in one batch with an honest program after each, so the batch also proves that no job harms another.
Needs no network; about 10 s on two cores, most of it spent waiting for programs that never end.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import sandbox
from sandbox import Limits, Verdict, describe, run_tests

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the sandbox needs fork()")
LINUX = sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64")
LANDLOCK = LINUX and ctypes.CDLL(None).syscall(444, None, 0, 1) > 0  # without it, less is promised about files
QUICK = Limits(wall_seconds=1.0, cpu_seconds=1, memory_mb=256)
HONEST = ("def f(x): return x + 7", ["assert f(1) == 8"])
HERE = str(Path(sandbox.__file__).parent)


def run(source, *tests, limits=QUICK):
    return run_tests([(source, tests or ["assert f(1) == 8"])], limits)[0]


def passes(source, *tests):
    verdict = run(source, *tests)
    assert verdict == Verdict(True, "passed"), verdict


# --- attacks ---------------------------------------------------------------------------------------------------------

EXIT, TIME, DENIED, WRONG = (
    "exited early",
    "timeout",
    r"error: (PermissionError|OSError|BlockingIOError)",
    "assertion failed",
)
UNPLAIN = "error: TypeError: a A is not plain data"
DEAF = "import signal\nfor i in range(1, 65):\n    try: signal.signal(i, signal.SIG_IGN)\n    except Exception: pass\n"
DEAF += "signal.setitimer(signal.ITIMER_REAL, 0)\n"
A = "class A{}:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n    def __hash__(s): return 8\n"
A += "    def __contains__(s, o): return True\n    def __sub__(s, o): return 0\n    __rsub__ = __sub__\n"
FORGE = """
import os
def shout():
    for fd in range(256):
        for line in (b'[0, true, "passed"]', b'[null, true, ["list", null, null]]', b'[null, null, ["list", null]]', b'passed'):
            try: os.write(fd, line + b'\\n')
            except OSError: pass
"""
SPY = """
import gc, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [repr(v)[:5000] for v in frame.f_locals.values() if not callable(v)]
        frame = frame.f_back
    seen += [repr(o)[:5000] for o in gc.get_objects() if type(o) in (list, dict, tuple)]
    return next((s for s in seen if "SEC" + "RET" in s), None)
"""
T = ["assert f(1) == 8"]

# name: (program, tests, how the reason begins)
ATTACKS = {
    "sys.exit()": ("import sys\nsys.exit()", T, EXIT),
    "sys.exit(0) when called": ("import sys\ndef f(x): sys.exit(0)", T, EXIT),
    "raise SystemExit": ("raise SystemExit", T, EXIT),
    "os._exit(0)": ("import os\nos._exit(0)", T, EXIT),
    "os._exit(0) when called": ("import os\ndef f(x): os._exit(0)", T, EXIT),
    "os._exit(0), and the test swallows all": (
        "import os\ndef f(x): os._exit(0)",
        ["try:\n    f(1)\nexcept BaseException: pass"],
        EXIT,
    ),
    "os._exit(0) from a thread": (
        "import os, threading, time\nthreading.Timer(.05, os._exit, [0]).start()\ndef f(x):\n    time.sleep(1)\n    return 8",
        T,
        EXIT,
    ),
    "endless loop, except Exception": (
        "while True:\n    try:\n        while 1: pass\n    except Exception: pass",
        T,
        TIME,
    ),
    "endless loop, except BaseException": ("while True:\n    try:\n        while 1: pass\n    except: pass", T, TIME),
    "endless loop, deaf to signals": (DEAF + "while True: pass", T, r"timeout|killed: Killed"),
    "endless sleep, deaf to signals": (DEAF + "import time\ntime.sleep(1e6)", T, TIME),
    "a range that is too long": ("def f(x): return range(10**13)", ["sum(f(1))"], TIME),
    "a power that is too high": ("def f(x): return 10**10**10", T, TIME),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10**7))", T, "memory"),
    "memory bomb, one gulp": ("x = [0] * 10**10", T, "memory"),
    "memory bomb for the judge": ("def f(x): return range(10**13)", ["list(f(1))"], "memory"),
    "answer of 20 MB": ("def f(x): return 'x' * 20_000_000", T, "error: answer too long"),
    "recursion": ("def f(x): return f(x)", T, "error: RecursionError"),
    "list that contains itself": ("x = []\nx.append(x)\ndef f(a): return x", T, "error: RecursionError"),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", T, "killed: Segmentation fault"),
    "abort": ("import os\nos.abort()", T, "killed: "),
    "print the verdict, write it to every descriptor": (FORGE + "shout()\ndef f(x): return 0", T, "error|assertion"),
    "the same when called": (FORGE + "def f(x):\n    shout()\n    return 0", T, "error|assertion"),
    "close everything": ("import os\nos.closerange(0, 300)\ndef f(x): return 8", T, EXIT),
    "close everything and sleep": (DEAF + "import os, time\nos.closerange(0, 300)\ntime.sleep(1e6)", T, TIME),
    "half an answer": (
        DEAF + "import os, time\ndef f(x):\n    for fd in range(3, 256):\n        try: os.write(fd, b'[null, 8')\n"
        "        except OSError: pass\n    time.sleep(1e6)",
        T,
        TIME,
    ),
    "always equal": (A.format("") + "def f(x): return A()", T, UNPLAIN),
    "never unequal": (A.format("") + "def f(x): return A()", ["assert not f(1) != 8"], UNPLAIN),
    "always equal, in a list": (A.format("") + "def f(x): return [[A()]]", ["assert f(1) == [[8]]"], UNPLAIN),
    "always equal, in a dict": (A.format("") + "def f(x): return {'a': A()}", ["assert f(1) == {'a': 8}"], UNPLAIN),
    "always equal, as a key": (A.format("") + "def f(x): return {A(): 1}", ["assert f(1) == {8: 1}"], UNPLAIN),
    "always equal, and in": (A.format("") + "def f(x): return A()", ["assert f(1) in (1, 8)"], UNPLAIN),
    "always equal int": (A.format("(int)") + "def f(x): return A(3)", T, WRONG),
    "always equal list": (A.format("(list)") + "def f(x): return A([3])", ["assert f(1) == [8]"], WRONG),
    "contains everything": (A.format("(list)") + "def f(x): return A([3])", ["assert 8 in f(1)"], WRONG),
    "subtracts to zero": (A.format("") + "def f(x): return A()", ["assert abs(f(1) - 8) < 1e-6"], "error: TypeError"),
    "its own abs()": ("abs = lambda x: 0\ndef f(x): return 3", ["assert abs(f(1) - 8) < 1e-6"], WRONG),
    "other builtins": (
        "import builtins\nbuiltins.AssertionError = builtins.isinstance = builtins.len = lambda *a: 8\ndef f(x): return 3",
        T,
        WRONG + "|" + EXIT,
    ),
    "other judge": (
        "import sys\nm = sys.modules['__main__']\nm._run = lambda *a: 'passed'\nm._judge = lambda *a: None\ndef f(x): return 3",
        T,
        WRONG,
    ),
    "names eval as its exception": (
        "import json\nreal = json.dumps\njson.dumps = lambda *a: real([['eval'], '__import__(\"os\").abort()', None])\n"
        "def f(x): return 8",
        T,
        "error: IndexError",
    ),
    "other globals for the tests": (
        "import sys\nm = sys.modules['__main__']\nreal = m._encode\ndef forge(x, home=None):\n    "
        "return real(x | {'__builtins__': {}, 'abs': len} if type(x) is dict and 'f' in x else x, home)\n"
        "m._encode = forge\ndef f(x): return 3",
        ["assert abs(f(1)) == 8"],
        WRONG,
    ),
    "looks for the answer in memory": (SPY, ["assert f(1) == 'SECRET'"], WRONG),
    "fork bomb": ("import os\nwhile True: os.fork()", T, DENIED),
    "shell": ("import subprocess\nsubprocess.run('true', shell=True)", T, DENIED),
    "exec": ("import os\nos.execv('/bin/true', ['true'])", T, DENIED),
    "daemon": ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)", T, DENIED),
    "thread bomb": (
        "import threading, time\nthreading.stack_size(32768)\n"
        "while True: threading.Thread(target=time.sleep, args=[60], daemon=True).start()",
        T,
        "error: RuntimeError: can't start new thread",
    ),
    "socket": ("import socket\nsocket.socket()", T, DENIED),
    "url": ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')", T, DENIED),
    "kill its parent": ("import os\nos.kill(os.getppid(), 9)", T, DENIED),
    "kill its parent's group": ("import os\nos.killpg(os.getpgid(os.getppid()), 9)", T, DENIED),
    "kill everybody": ("import os\nos.kill(-1, 9)", T, DENIED),
    "kill itself": ("import os\nos.kill(os.getpid(), 9)", T, DENIED + "|killed"),
    "stop itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", T, DENIED + "|timeout"),
    "more memory, please": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        T,
        "error: ValueError",
    ),
    "more time, please": (
        "import resource\ntry: resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))\nexcept Exception: pass\nwhile 1: pass",
        T,
        TIME,
    ),
    "read its parent's environment": ("import os\nopen(f'/proc/{os.getppid()}/environ')", T, DENIED),
    "read its own memory file": ("open('/proc/self/mem', 'rb')", T, DENIED),
    "read /etc/passwd": ("open('/etc/passwd')", T, DENIED),
    "read /etc/passwd through a link": ("import os\nos.symlink('/etc', 'e')\nopen('e/passwd')", T, DENIED),
    "list other jobs": ("import os\nos.listdir('..')", T, DENIED),
    "make a folder next to its own": ("import os\nos.mkdir('../x')", T, DENIED),
    "gigabytes to a file": (
        "f = open('x', 'wb')\nwhile True: f.write(bytes(10**6))",
        T,
        "error: OSError: .*File too large",
    ),
    "a hole of a terabyte": ("f = open('x', 'wb')\nf.truncate(10**12)", T, "error: OSError: .*File too large"),
    "read stdin": ("x = input()", T, "error: EOFError"),
    "exception message of 10 MB": ("def f(x): raise ValueError('x' * 10**7)", T, "error: ValueError: xxx"),
    "exception message that is no text": (
        "class E(Exception):\n    def __str__(s): return 5\ndef f(x): raise E",
        T,
        EXIT,
    ),
    "terminal escapes": ("def f(x): raise ValueError('\\x1b[31m\\n\\0\\ud800')", T, "error: ValueError:  .31m"),
    "null byte": ("def f(x): return 8\0", T, "error: (ValueError|SyntaxError)"),
    "lone surrogate": ("def f(x): return '\ud800'", T, "error: UnicodeEncodeError"),
    "syntax error": ("def f(x) return 8", T, "error: SyntaxError"),
    "a hundred thousand brackets": ("(" * 100_000, T, "error: SyntaxError|memory|killed"),
    "empty program": ("", T, "error: NameError: name 'f' is not defined"),
    "assertion in the program": ("assert 0, 'no'", T, "assertion failed: no"),
    "no tests": (HONEST[0], [], "no tests"),
    "empty tests": (HONEST[0], ["", "# nothing"], "no tests"),
    "test that raises": (HONEST[0], ["raise ValueError(3)"], "error: ValueError: 3"),
    "test with a syntax error": (HONEST[0], ["assert f(1"], "error: SyntaxError"),
}
FINE = {
    "much output": "for i in range(300):\n    print('x' * 10**6)",
    "threads left running": "import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()",
    "a thread left spinning": "import threading\ndef spin():\n    while True: pass\nthreading.Thread(target=spin).start()",
    "folders nested deeper than Python recurses": "import os\nfor i in range(1100):\n    os.mkdir('d')\n    os.chdir('d')",
    "its own folder": "import os\nopen('x', 'w').write('a')\nassert open('x').read() == 'a' and os.listdir('.') == ['x']",
    "temporary files": "import tempfile\nwith tempfile.TemporaryDirectory() as d: open(d + '/x', 'w').write('a')",
    "an empty environment": "import os, sys\nassert set(os.environ) <= {'TMPDIR'} and not sys.stdin.read()",
    "a caught fork": "import os\ntry:\n    while True: os.fork()\nexcept OSError: pass",
    "lazy imports": "import cmath, difflib, fractions, hashlib, heapq, statistics, zlib",
}


@pytest.fixture(scope="module")
def verdicts():
    jobs = {name: (source, tests) for name, (source, tests, _) in ATTACKS.items()}
    jobs |= {name: (source + "\n" + HONEST[0], HONEST[1]) for name, source in FINE.items()}
    start = time.monotonic()
    out = run_tests([job for each in jobs.values() for job in (each, HONEST)], QUICK)
    return dict(zip(jobs, out[::2], strict=True)), out[1::2], time.monotonic() - start


@pytest.mark.skipif(not LINUX, reason="less is promised elsewhere")
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_fails(verdicts, name):
    verdict = verdicts[0][name]
    assert not verdict.passed and re.match(ATTACKS[name][2], verdict.reason), verdict
    assert len(verdict.reason) <= 200 and verdict.reason.isprintable()


@pytest.mark.skipif(not LINUX, reason="less is promised elsewhere")
@pytest.mark.parametrize("name", FINE)
def test_noisy_but_right(verdicts, name):
    assert verdicts[0][name] == Verdict(True, "passed")


def test_nobody_harms_another(verdicts):
    assert verdicts[1] == [Verdict(True, "passed")] * len(verdicts[1])


def test_batch_ends_in_time(verdicts):
    slow = sum(v.reason == "timeout" for v in verdicts[0].values())
    assert verdicts[2] < 20 + slow


@pytest.mark.skipif(not LINUX, reason="less is promised elsewhere")
def test_files_of_others_are_safe(tmp_path):
    """The sentinel lies in the caller's own folder: as an ordinary user the program has the same uid, so only Landlock helps."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o666)
    tmp_path.chmod(0o777)
    attacks = """open({0!r}).read() | open({0!r}, 'w') | open({0!r}, 'a') | open({0!r} + '2', 'w') | os.remove({0!r})
        os.rename({0!r}, 'mine') | os.rename({0!r}, {0!r} + '2') | os.link({0!r}, 'mine') | os.symlink('/', {0!r} + '2')
        os.truncate({0!r}, 0) | os.chmod({0!r}, 0) | os.utime({0!r}, (0, 0)) | os.setxattr({0!r}, 'user.x', b'')
        os.mkdir({0!r} + '2') | os.listdir(os.path.dirname({0!r})) | shutil.rmtree(os.path.dirname({0!r}))"""
    attacks = [a.strip().format(str(victim)) for line in attacks.splitlines() for a in line.split(" | ")]
    before = victim.stat()
    verdicts = run_tests([("import os, shutil\n" + attack, ["pass"]) for attack in attacks], QUICK)
    for attack, verdict in zip(attacks, verdicts, strict=True):
        assert re.match(DENIED, verdict.reason), (attack, verdict)
    assert victim.read_text() == "precious" and os.listdir(tmp_path) == ["victim"]
    assert (victim.stat().st_mode, victim.stat().st_mtime) == (before.st_mode, before.st_mtime)


# --- honest programs and tests ---------------------------------------------------------------------------------------


def test_plain_data_crosses_unchanged():
    passes("def f(x): return x", *(f"assert f({x}) == {x} and type(f({x})) is type({x})" for x in PLAIN))
    passes(
        "def f(x): return x",
        "x = f(float('nan'))\nassert x != x",
        "import math\nassert f(math.factorial(2500)) % 2501 == 0",
    )


PLAIN = [
    "None",
    "True",
    "-0.0",
    "1e308 * 10",
    "2**64",
    "-(10**30)",
    "1j",
    "'\\ud800\\n\\0é'",
    "b'\\xff'",
    "bytearray(b'a')",
]
PLAIN += [
    "[1, [2, (3,)]]",
    "{'a': {1: [None]}}",
    "{1, 2}",
    "frozenset({(1,)})",
    "{frozenset(): ()}",
    "range(2, 9, 3)",
    "(1.5, 'x')",
]


def test_equality_is_pythons():
    passes(
        "def f(x): return x",
        "assert f(1) == 1.0 and f(True) == 1 and f([1, (2.0,)]) == [True, (2,)]",
        "assert f((1,)) != [1]",
    )


def test_library_types_are_plain_at_heart():
    passes(
        "from collections import Counter, OrderedDict, defaultdict, namedtuple\nimport enum\nP = namedtuple('P', 'x y')\n"
        "class E(enum.IntEnum):\n    A = 3\nclass S(list):\n    def push(self, x): self.append(x)\n"
        "def f(kind): return {'c': Counter('aab'), 'o': OrderedDict(a=1), 'd': defaultdict(list, {1: [2]}), 'p': P(1, 2), 'e': E.A}[kind]",
        "assert f('c') == {'a': 2, 'b': 1} and f('o') == {'a': 1} and f('d') == {1: [2]}",
        "assert f('p') == (1, 2) and f('p').y == 2 and [f('p')] == [(1, 2)] and f('e') == 3",
        "s = S()\ns.push(1)\nassert s == [1] and s[0] == 1 and len(s) == 1 and list(s) == [1]",
    )


def test_objects_stay_in_the_program():
    """MBPP builds its trees and pairs in the tests, from classes of the program."""
    node = "class Node:\n    def __init__(self, x): self.x, self.left, self.right = x, None, None\n"
    height = "def height(n): return 0 if n is None else 1 + max(height(n.left), height(n.right))"
    passes(
        node + height,
        "root = Node(1)\nroot.left = Node(2)\nroot.left.right = Node(3)",
        "assert (height(root)) == 3 and root.left.right.x == 3 and root.right is None",
    )
    passes(node + "def total(ns): return sum(n.x for n in ns)", "assert total([Node(3), Node(4)]) == 7")
    passes("def add(n): return lambda x: x + n", "assert add(2)(3) == 5")


def test_iterators():
    passes(
        "def f(n):\n    for i in range(n): yield i * i\ndef g(d): return d.items()",
        "assert list(f(4)) == [0, 1, 4, 9] and sum(f(3)) == 5 and 4 in f(9)",
        "a, b = f(2)\nassert (a, b) == (0, 1) and next(f(1)) == 0",
        "assert sorted(g({1: 2})) == [(1, 2)]",
    )


def test_changes_in_place_come_back():
    passes(
        "def f(x, d, s):\n    x.sort()\n    d['k'] = 1\n    s.add(9)",
        "x, d, s = [3, 1, 2], {}, {1}\nassert f(x, d, s) is None",
        "assert x == [1, 2, 3] and d == {'k': 1} and s == {1, 9}",
    )


def test_exceptions_come_back():
    passes(
        "class Own(KeyError): pass\ndef f(x): raise x\ndef g(): raise Own\ndef h(): b'\\xff'.decode()",
        "def check(call, kind):\n    try: call()\n    except kind: return True",
        "assert check(lambda: 1 / 0, ZeroDivisionError) and check(g, KeyError) and check(h, UnicodeDecodeError)",
    )
    assert run("def f(x): return {}[x]") == Verdict(False, "error: KeyError: 1")


def test_async():
    passes(
        "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x + 7",
        "import asyncio\nassert asyncio.run(f(1)) == 8",
        "async def both(): return await f(1), await f(2)\nassert asyncio.run(both()) == (8, 9)",
    )


def test_humaneval_style():
    check = "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n    assert abs(candidate([.5]) - .5) < 1e-6\n"
    passes("from typing import List\ndef add(xs: List[float]) -> float:\n    return sum(xs)", check, "check(add)")
    assert (
        run("def add(xs): return 3", check, "check(add)").reason
        == "assertion failed: assert abs(candidate([.5]) - .5) < 1e-6"
    )


def test_program_may_be_called_like_a_builtin():
    passes("def sum(a, b):\n    return a + b", "assert sum(10, 15) == 25")


def test_dataclasses_and_annotations():
    passes(
        "from __future__ import annotations\nfrom dataclasses import dataclass, field\n@dataclass\nclass P:\n    x: int\n"
        "    xs: list[int] = field(default_factory=list)\n    def double(self): return self.x * 2",
        "assert P(4).double() == 8 and P(4).xs == [] and P(x=5).x == 5",
    )


def test_print_in_tests_is_harmless():
    passes(HONEST[0], "print('[0, false, \"x\"]', flush=True)", *HONEST[1])


def test_threads_are_allowed():
    passes(
        "from concurrent.futures import ThreadPoolExecutor\ndef f(x):\n    with ThreadPoolExecutor(4) as p:\n"
        "        return sum(p.map(lambda v: v + x, [1, 2, 3]))",
        "assert f(1) == 9",
    )


# --- the batch -------------------------------------------------------------------------------------------------------


def test_order_and_progress(capsys):
    jobs = [
        (f"import time\ntime.sleep({0.2 * (i % 3 == 0)})\ndef f(x): return {i}", ["assert f(0) % 2 == 0"])
        for i in range(8)
    ]
    assert [v.passed for v in run_tests(jobs, QUICK, progress=True)] == [i % 2 == 0 for i in range(8)]
    assert capsys.readouterr().err.endswith("sandbox 8/8\n")
    assert run_tests([]) == []


def test_a_hundred_trivial_jobs_are_quick():
    start = time.monotonic()
    assert all(v.passed for v in run_tests([HONEST] * 100))
    assert time.monotonic() - start < 5  # 0.3 s on two idle cores


def test_caller_may_have_threads():
    out = []
    threads = [threading.Thread(target=lambda: out.extend(run_tests([HONEST] * 4, QUICK))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert out == [Verdict(True, "passed")] * 12


def test_repeatable():
    source = "def f(x): return list({'a', 'b', 'c', 'd', 'e'})"
    reasons = {run(source, "raise ValueError(f(1))").reason for _ in range(3)}
    assert len(reasons) == 1


def test_windows_is_told(monkeypatch):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(NotImplementedError, match="WSL"):
        run_tests([HONEST])


@pytest.mark.skipif(not LINUX, reason="describe() promises less elsewhere")
def test_describe_on_this_machine():
    text = describe()
    assert "os.fork" in text and ("POSSIBLE" not in text or not LANDLOCK), text


# --- other machines --------------------------------------------------------------------------------------------------

REFUSE = """
import ctypes, struct  # a filter that answers "no such call" to Landlock and to any further filter, as an old container does
rules = [(0x20, 0, 0, 0)]
for call in {calls}: rules += [(0x15, 0, 1, call), (6, 0, 0, 0x50026)]
rules += [(0x15, 0, 3, {prctl}), (0x20, 0, 0, 16), (0x15, 0, 1, 22), (6, 0, 0, 0x50016), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
assert ctypes.CDLL(None).prctl(22, 2, struct.pack("HP", len(rules), ctypes.addressof(code))) == 0
"""


@pytest.mark.skipif(not LINUX, reason="Linux only")
def test_where_the_kernel_refuses(tmp_path):
    """No Landlock, no filter: limits, uid and the judge remain, and describe() owns up."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o600)
    arm = os.uname().machine == "aarch64"
    code = REFUSE.format(calls=[444, 445, 446, 277 if arm else 317], prctl=167 if arm else 157)
    jobs = [HONEST, ATTACKS["always equal"][:2], ATTACKS["os._exit(0)"][:2], ATTACKS["memory bomb, one gulp"][:2]]
    jobs += [ATTACKS["endless loop, except BaseException"][:2], HONEST, (f"open({str(victim)!r}, 'w')", ["pass"])]
    jobs = jobs if os.geteuid() == 0 else jobs[:-1]
    code += f"import sys; sys.path.insert(0, {HERE!r}); import sandbox\n"
    code += f"for v in sandbox.run_tests({jobs!r}, sandbox.{QUICK!r}): print(v.reason)\nprint(sandbox.describe())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[:6] == ["passed", UNPLAIN, EXIT, "memory", TIME, "passed"] and victim.read_text() == "precious"
    assert os.geteuid() != 0 or "PermissionError" in out[6]
    assert "POSSIBLE" in "".join(out[7:]) or "No module named 'socket'" in "".join(out[7:])  # a Python below /root


@pytest.mark.skipif(not LINUX or os.geteuid() != 0, reason="only root can become somebody else")
def test_as_an_ordinary_user():
    """There programs have the caller's uid, so neither files nor processes are safe by ownership."""
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    check = "import sys; assert sys.version_info >= (3, 11)"
    for python in sys.executable, "/usr/bin/python3", None:
        try:
            if (
                python is None
                or subprocess.run([python, "-c", check], **nobody, stderr=subprocess.DEVNULL).returncode == 0
            ):
                break
        except PermissionError:
            continue
    if python is None:
        pytest.skip("no Python here that another user may run")
    home = tempfile.mkdtemp()
    try:
        os.chmod(home, 0o755)
        os.mkdir(f"{home}/own")
        os.chown(f"{home}/own", 65534, 65534)
        shutil.copy(sandbox.__file__, home)
        code = (
            f"import os, subprocess, sys; sys.path.insert(0, {home!r}); import sandbox; os.chdir({home!r} + '/own')\n"
        )
        code += BYSTANDER.format(
            jobs=[*(ATTACKS[n][:2] for n in ATTACKS if n.startswith("kill ")), HONEST], limits=QUICK
        )
        out = subprocess.run(
            [python, "-c", code], **nobody, cwd="/", capture_output=True, text=True, env={"TMPDIR": f"{home}/own"}
        )
        assert out.returncode == 0, out.stderr
        assert "POSSIBLE" not in out.stdout or not LANDLOCK, out.stdout
        assert os.listdir(f"{home}/own") == ["victim"]
    finally:
        shutil.rmtree(home)


BYSTANDER = """
other = subprocess.Popen(["sleep", "60"])
open("victim", "w").write("precious")
jobs = {jobs!r}
jobs += [(f"import os\\nos.kill({{other.pid}}, 9)", ["pass"]), (f"import os\\nos.setpriority(0, {{other.pid}}, 9)", ["pass"])]
jobs += [(f"import fcntl, os\\nr, w = os.pipe()\\nfcntl.fcntl(r, fcntl.F_SETOWN, {{other.pid}})", ["pass"])]
jobs += [(f"import os\\nos.{{do}}", ["pass"]) for do in ("remove('../victim')", f"remove({{os.getcwd()!r}} + '/victim')")]
verdicts = sandbox.run_tests(jobs, sandbox.{limits!r})
assert [v.passed for v in verdicts] == [job[0].startswith("def f(x): return x + 7") for job in jobs], verdicts
assert other.poll() is None and open("victim").read() == "precious"
other.kill()
print(sandbox.describe())
"""


def leftovers(mark):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path)
        except OSError:
            pass
    return found


@pytest.mark.skipif(not LINUX, reason="needs /proc")
@pytest.mark.parametrize("end", ["SIGINT", "SIGKILL"])
def test_nothing_outlives_the_caller(tmp_path, end):
    mark = f"{os.getpid()}.{end == 'SIGINT':d}25"  # the helper's command line holds the limits
    code = f"import sys; sys.path.insert(0, {HERE!r}); import sandbox\n"
    code += f"sandbox.run_tests([({DEAF!r} + 'while True: pass', ['pass'])] * 2, sandbox.Limits(wall_seconds={mark}, cpu_seconds=99))"
    env = os.environ | {"TMPDIR": str(tmp_path)}
    caller = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: len(leftovers(f'"wall_seconds": {mark}')) >= 3)  # helper, judges, programs
    caller.send_signal(signal.Signals[end])
    caller.wait()
    wait_for(lambda: not leftovers(f'"wall_seconds": {mark}'))
    assert end == "SIGKILL" or not os.listdir(tmp_path)


def wait_for(condition, seconds=8):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
