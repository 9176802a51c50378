"""sandbox.py survives every nasty program below, gives honest ones their due, and tells the truth about this machine.

Attacks run in a batch with an honest program after each, so the batch also proves that no job harms another. Those that
make it wait (for programs that never end) are a batch of their own, marked slow but for one of each kind. No network.
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
from functools import cache
from pathlib import Path

import pytest
from conftest import wait_for

from tasks import sandbox
from tasks.sandbox import Limits, Verdict, describe, run_tests

pytestmark = pytest.mark.skipif(not sandbox.ISOLATES, reason="no isolation here: see test_platform.py")
LINUX = sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64")
LANDLOCK = LINUX and ctypes.CDLL(None).syscall(444, None, 0, 1) > 0
linux = pytest.mark.skipif(not LINUX, reason="less is promised elsewhere")
QUICK = Limits(wall_seconds=1.0, cpu_seconds=1, memory_mb=256)
PASSED = Verdict(True, "passed")
F, T = "def f(x): return x + 7\n", ["assert f(1) == 8"]


def run(source, *tests):
    return run_tests([(source, tests)], QUICK)[0]


# --- attacks ---------------------------------------------------------------------------------------------------------

EXIT, TIME, WRONG, UNPLAIN = "exited early", "timeout", "assertion failed", "error: TypeError: a A is not plain data"
DENIED, TOO_LARGE = r"error: (PermissionError|OSError|BlockingIOError)", r"error: OSError: .*File too large"
DEAF = """
import os, signal, time
for i in range(1, 65):
    try: signal.signal(i, signal.SIG_IGN)
    except Exception: pass
signal.setitimer(signal.ITIMER_REAL, 0)
"""
LATE_EXIT = """
import os, threading, time
threading.Timer(0.05, os._exit, [0]).start()
def f(x):
    time.sleep(1)
    return 8
"""
SHOUT = """
import os
def shout():
    for fd in range(256):
        for line in b'[0, true, "passed"]', b'[null, true, ["list", null, null]]', b'[null, null, ["list", null]]', b'passed':
            try: os.write(fd, line + b'\\n')
            except OSError: pass
"""
HALF = """
def f(x):
    for fd in range(3, 256):
        try: os.write(fd, b'[null, 8')
        except OSError: pass
    time.sleep(1e6)
"""
EQUAL = """
class A{}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 8
    def __contains__(self, other): return True
    def __sub__(self, other): return 0
    __rsub__ = __sub__
def f(x): return {}
"""
BUILTINS = "import builtins\nbuiltins.AssertionError = builtins.isinstance = builtins.len = lambda *a: 8\ndef f(x): return 3"
JUDGE = "import sys\nm = sys.modules['__main__']\nm._run = lambda *a: 'passed'\nm._judge = lambda *a: 0\ndef f(x): return 3"
EVAL = """
import json
real = json.dumps
json.dumps = lambda *a: real([['eval'], '__import__("os").abort()', None])
def f(x): return 8
"""
GLOBALS = """
import sys
m = sys.modules['__main__']
real = m._encode
def forge(x, home=None):
    return real(x | {'__builtins__': {}, 'abs': len} if type(x) is dict and 'f' in x else x, home)
m._encode = forge
def f(x): return 3
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
THREADS = """
import threading, time
threading.stack_size(32768)
while True: threading.Thread(target=time.sleep, args=[60], daemon=True).start()
"""
OWNER = "import fcntl, os, socket\nfcntl.ioctl(socket.socketpair()[0], {}, os.getppid().to_bytes(4, 'little'))"
NUMBER = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
for call in 1000, 462, 2**30 + 41:  # of the future; of 2024; socket() of another calling convention
    assert libc.syscall(call, 1, 1, 0) == -1 and ctypes.get_errno() == errno.ENOSYS
raise OSError
"""
MORE_TIME = """
import resource
try: resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))
except Exception: pass
while True: pass
"""

# name: (program, how the reason begins, its tests if they are not the usual ones)
ATTACKS = {
    "sys.exit()": ("import sys\nsys.exit()", EXIT),
    "sys.exit(0) when called": ("import sys\ndef f(x): sys.exit(0)", EXIT),
    "raise SystemExit": ("raise SystemExit", EXIT),
    "os._exit(0)": ("import os\nos._exit(0)", EXIT),
    "os._exit(0) when called": ("import os\ndef f(x): os._exit(0)", EXIT),
    "os._exit(0), all caught": ("import os\ndef f(x): os._exit(0)", EXIT, "try:\n    f(1)\nexcept BaseException: pass"),
    "os._exit(0) from a thread": (LATE_EXIT, EXIT),
    "endless, except Exception": ("while True:\n    try:\n        while 1: pass\n    except Exception: pass", TIME),
    "endless, except BaseException": ("while True:\n    try:\n        while 1: pass\n    except: pass", TIME),
    "endless, deaf to signals": (DEAF + "while True: pass", "timeout|killed"),
    "asleep, deaf to signals": (DEAF + "time.sleep(1e6)", TIME),
    "keeps the judge busy": ("def f(x): return range(10**13)", TIME, "sum(f(1))"),
    "keeps C code busy": ("def f(x): return 10**10**10", TIME),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10**7))", "memory"),
    "memory bomb, one gulp": ("x = [0] * 10**10", "memory"),
    "memory bomb for the judge": ("def f(x): return range(10**13)", "memory", "list(f(1))"),
    "answer of 20 MB": ("def f(x): return 'x' * 20_000_000", "error: answer too long"),
    "recursion": ("def f(x): return f(x)", "error: RecursionError"),
    "list that contains itself": ("x = []\nx.append(x)\ndef f(a): return x", "error: RecursionError"),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", "killed: Segmentation fault"),
    "abort": ("import os\nos.abort()", "killed"),
    "writes verdicts everywhere": (SHOUT + "shout()\ndef f(x): return 0", "error|assertion"),
    "writes verdicts when called": (SHOUT + "def f(x):\n    shout()\n    return 0", "error|assertion"),
    "writes half an answer": (DEAF + HALF, TIME),
    "closes everything": ("import os\nos.closerange(0, 300)\n" + F, EXIT),
    "closes everything and sleeps": (DEAF + "os.closerange(0, 300)\ntime.sleep(1e6)", TIME),
    "equals everything": (EQUAL.format("", "A()"), UNPLAIN),
    "never differs": (EQUAL.format("", "A()"), UNPLAIN, "assert not f(1) != 8"),
    "equals everything, in a list": (EQUAL.format("", "[[A()]]"), UNPLAIN, "assert f(1) == [[8]]"),
    "equals everything, in a dict": (EQUAL.format("", "dict(a=A())"), UNPLAIN, "assert f(1) == dict(a=8)"),
    "equals everything, as a key": (EQUAL.format("", "{A(): 1}"), UNPLAIN, "assert f(1) == {8: 1}"),
    "equals everything, with in": (EQUAL.format("", "A()"), UNPLAIN, "assert f(1) in (1, 8)"),
    "int that equals everything": (EQUAL.format("(int)", "A(3)"), WRONG),
    "list that equals everything": (EQUAL.format("(list)", "A([3])"), WRONG, "assert f(1) == [8]"),
    "contains everything": (EQUAL.format("(list)", "A([3])"), WRONG, "assert 8 in f(1)"),
    "subtracts to zero": (EQUAL.format("", "A()"), "error: TypeError", "assert abs(f(1) - 8) < 1e-6"),
    "its own abs()": ("abs = lambda x: 0\ndef f(x): return 3", WRONG, "assert abs(f(1) - 8) < 1e-6"),
    "other builtins": (BUILTINS, WRONG + "|" + EXIT),
    "other judge": (JUDGE, WRONG),
    "other globals for the tests": (GLOBALS, WRONG, "assert abs(f(1)) == 8"),
    "raises eval": (EVAL, "error: IndexError"),
    "looks for the answer in memory": (SPY, WRONG, "assert f(1) == 'SECRET'"),
    "fork bomb": ("import os\nwhile True: os.fork()", DENIED),
    "shell": ("import subprocess\nsubprocess.run('true', shell=True)", DENIED),
    "exec": ("import os\nos.execv('/bin/true', ['true'])", DENIED),
    "daemon": ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)", DENIED),
    "thread bomb": (THREADS, "error: RuntimeError: can't start new thread"),
    "socket": ("import socket\nsocket.socket()", DENIED),
    "a pair for datagrams": ("import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", DENIED),
    "a pair for packets": ("import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)", DENIED),
    "a stream to somebody else": ("import socket\nsocket.socketpair()[0].sendto(b'x', '/run/x')", DENIED),
    "signals by FIOSETOWN": (OWNER.format("0x8901"), DENIED),
    "signals by SIOCSPGRP": (OWNER.format("0x8902"), DENIED),
    "signals by F_SETOWN": ("import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())", DENIED),
    "a call that no Python needs": ("import os\nos.eventfd(0)", DENIED),
    "a call that no Python needs, in its own folder": ("import os\nos.mkfifo('x')", DENIED),
    "a call by its number": (NUMBER, "error: OSError"),
    "url": ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')", DENIED),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)", DENIED),
    "kills its parent's group": ("import os\nos.killpg(os.getpgid(os.getppid()), 9)", DENIED),
    "kills everybody": ("import os\nos.kill(-1, 9)", DENIED),
    "kills itself": ("import os\nos.kill(os.getpid(), 9)", DENIED),
    "stops itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", DENIED),
    "wants more memory": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "error: ValueError"),
    "wants more time": (MORE_TIME, TIME),
    "reads its parent's environment": ("import os\nopen(f'/proc/{os.getppid()}/environ')", DENIED),
    "reads its own memory": ("open('/proc/self/mem', 'rb')", DENIED),
    "reads /etc/passwd": ("open('/etc/passwd')", DENIED),
    "reads /etc/passwd by a link": ("import os\nos.symlink('/etc', 'e')\nopen('e/passwd')", DENIED),
    "lists the other jobs": ("import os\nos.listdir('..')", DENIED),
    "makes a folder next to its own": ("import os\nos.mkdir('../x')", DENIED),
    "gigabytes to a file": ("f = open('x', 'wb')\nwhile True: f.write(bytes(10**6))", TOO_LARGE),
    "a hole of a terabyte": ("f = open('x', 'wb')\nf.truncate(10**12)", TOO_LARGE),
    "reads stdin": ("x = input()", "error: EOFError"),
    "message of 10 MB": ("def f(x): raise ValueError('x' * 10**7)", "error: ValueError: xxx"),
    "message that is no text": ("class E(Exception):\n    def __str__(s): return 5\ndef f(x): raise E", EXIT),
    "message with escapes": ("def f(x): raise ValueError('\\x1b[31m\\n\\0\\ud800')", "error: ValueError:  .31m"),
    "null byte": (F + "\0", "error: (ValueError|SyntaxError)"),
    "lone surrogate": (F + "'\ud800'", "error: UnicodeEncodeError"),
    "syntax error": ("def f(x) return 8", "error: SyntaxError"),
    "a hundred thousand brackets": ("(" * 100_000, "error: SyntaxError|memory|killed"),
    "empty program": ("", "error: NameError: name 'f' is not defined"),
    "assertion in the program": ("assert 0, 'no'", "assertion failed: no"),
    "no tests": (F, "no tests"),
    "empty test": (F, "no tests", "# nothing"),
    "test that raises": (F, "error: ValueError: 3", "raise ValueError(3)"),
    "test with a syntax error": (F, "error: SyntaxError", "assert f(1"),
}
FINE = {
    "much output": "for i in range(100): print('x' * 10**6)",
    "threads left running": "import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()",
    "a thread left spinning": "import threading\ndef spin():\n    while 1: pass\nthreading.Thread(target=spin).start()",
    "folders deeper than Python recurses": "import os\nfor i in range(1100):\n    os.mkdir('d')\n    os.chdir('d')",
    "its own folder": "import os\nopen('x', 'w').write('a')\nassert open('x').read() == 'a' and os.listdir() == ['x']",
    "temporary files": "import tempfile\nwith tempfile.TemporaryDirectory() as d: open(d + '/x', 'w').write('a')",
    "an empty environment": "import os, sys\nassert set(os.environ) <= {'TMPDIR'} and not sys.stdin.read()",
    "a caught fork": "import os\ntry:\n    while True: os.fork()\nexcept OSError: pass",
    "a pair of streams": "import socket\na, b = socket.socketpair()\na.sendall(b'x')\nassert b.recv(1) == b'x'",
    "a pipe that does not wait": "import os\nr, w = os.pipe()\nos.set_blocking(r, False)\nos.set_inheritable(r, True)",
    "a database": "import sqlite3\nwith sqlite3.connect('x') as c: c.execute('create table t(x)')",
    "copies": "import shutil\nopen('x', 'w').write('a')\nshutil.copyfile('x', 'y')\nshutil.move('y', 'z')",
    "late imports": "import cmath, difflib, fractions, hashlib, heapq, statistics, zlib",
}


WAITED_FOR = {name for name, (_, reason, *_) in ATTACKS.items() if TIME in reason or "memory" in reason}
SLOW = WAITED_FOR - {"endless, except BaseException", "asleep, deaf to signals", "keeps the judge busy", "memory bomb, one gulp"}


def attack(name):
    source, _, *tests = ATTACKS[name]
    return source, [] if name == "no tests" else tests or T


def each(names):
    return pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in names])


@cache
def batch(slow):
    """Verdicts by name, those of the honest programs between, and how long all took."""
    jobs = {name: attack(name) for name in ATTACKS} | {name: (source + "\n" + F, T) for name, source in FINE.items()}
    jobs = {name: job for name, job in jobs.items() if (name in SLOW) == slow}
    start = time.monotonic()
    verdicts = run_tests([job for each in jobs.values() for job in (each, (F, T))], QUICK)
    return dict(zip(jobs, verdicts[::2], strict=True)), verdicts[1::2], time.monotonic() - start


@linux
@each(ATTACKS)
def test_attack_fails(name):
    verdict = batch(name in SLOW)[0][name]
    assert not verdict.passed and re.match(ATTACKS[name][1], verdict.reason), verdict
    assert len(verdict.reason) <= 200 and verdict.reason.isprintable()


@linux
@each(FINE)
def test_noisy_but_right(name):
    assert batch(name in SLOW)[0][name] == PASSED


both = pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])


@linux
@both
def test_nobody_harms_another(slow):
    between = batch(slow)[1]
    assert between == [PASSED] * len(between)


@linux
@both
def test_batch_ends_in_time(slow):
    verdicts, _, seconds = batch(slow)
    assert seconds < 15 + sum(verdict.reason == TIME for verdict in verdicts.values())


@pytest.mark.skipif(not LANDLOCK, reason="less is promised without Landlock")
def test_files_of_others_are_safe(tmp_path):
    """Anybody may write to this file and its folder, so neither uid nor ownership protects them."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for path, mode in (victim, 0o666), (tmp_path, 0o777):
        path.chmod(mode)
    attacks = """open({0!r}).read() | open({0!r}, 'w') | open({0!r}, 'a') | open({0!r} + '2', 'w') | os.remove({0!r})
        os.rename({0!r}, 'mine') | os.rename({0!r}, {0!r} + '2') | os.link({0!r}, 'mine') | os.symlink('/', {0!r} + '2')
        os.truncate({0!r}, 0) | os.chmod({0!r}, 0) | os.utime({0!r}, (0, 0)) | os.setxattr({0!r}, 'user.x', b'')
        os.mkdir({0!r} + '2') | os.listdir(os.path.dirname({0!r})) | shutil.rmtree(os.path.dirname({0!r}))"""
    attacks = [a.strip().format(str(victim)) for line in attacks.splitlines() for a in line.split(" | ")]
    before = victim.stat()
    verdicts = run_tests([("import os, shutil\n" + a, ["pass"]) for a in attacks], QUICK)
    for a, verdict in zip(attacks, verdicts, strict=True):
        assert re.match(DENIED, verdict.reason), (a, verdict)
    assert victim.read_text() == "precious" and os.listdir(tmp_path) == ["victim"]
    assert (victim.stat().st_mode, victim.stat().st_mtime) == (before.st_mode, before.st_mtime)


# --- honest programs and tests ---------------------------------------------------------------------------------------

PLAIN = """None | True | -0.0 | 1e308 * 10 | 2**64 | -(10**5000) | 1j | 'é\\ud800\\n\\0' | b'\\xff' | bytearray(b'a') | (1.5, 'x')
    [1, [2, (3,)]] | {'a': {1: [None]}} | {1, 2} | frozenset({(1,)}) | {frozenset(): ()} | range(2, 9, 3)"""
KINDS = """
from collections import Counter, OrderedDict, defaultdict, namedtuple
import enum
P = namedtuple('P', 'x y')
class E(enum.IntEnum):
    A = 3
class S(list):
    def push(self, x): self.append(x)
counter, ordered, default, pair, number = Counter('aab'), OrderedDict(a=1), defaultdict(list, {1: [2]}), P(1, 2), E.A
"""
NODE = """
class Node:
    def __init__(self, x): self.x, self.left, self.right = x, None, None
def height(n): return 0 if n is None else 1 + max(height(n.left), height(n.right))
def total(nodes): return sum(n.x for n in nodes)
"""
DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass, field
@dataclass
class P:
    x: int
    xs: list[int] = field(default_factory=list)
    def double(self): return self.x * 2
"""
RAISE = """
class Own(KeyError): pass
def f(): return 1 / 0
def g(): raise Own
def h(): b'\\xff'.decode()
"""
POOL = """
from concurrent.futures import ThreadPoolExecutor
def f(x):
    with ThreadPoolExecutor(4) as pool: return sum(pool.map(lambda v: v + x, [1, 2, 3]))
"""
CHECK = """

METADATA = {'author': 'x'}


def check(candidate):
    assert candidate([1, 2]) == 3
    assert abs(candidate([.5]) - .5) < 1e-6, "close"
"""
SUM = "def abs(x): return 0\ndef sum(a, b): return {}"
HONEST = {
    "plain data": (
        "def f(x): return x",
        *(f"assert f({x}) == {x} and type(f({x})) is type({x})" for x in re.split(r" \| |\n +", PLAIN)),
        "x = f(float('nan'))\nassert x != x",
    ),
    "equality is Python's": ("def f(x): return x", "assert f(1) == 1.0 and f([1, (2.0,)]) == [True, (2,)] != f([1, [2]])"),
    "plain at heart": (
        KINDS,
        "assert counter == {'a': 2, 'b': 1} and ordered == {'a': 1} and default == {1: [2]} and number == 3",
        "assert pair == (1, 2) and pair.y == 2 and [pair] == [(1, 2)]",
        "s = S()\ns.push(1)\nassert s == [1] and s[0] == 1 and len(s) == 1 and list(s) == [1]",
    ),
    "objects, as in MBPP": (  # its tests build trees and pairs from the program's classes
        NODE,
        "root = Node(1)\nroot.left = Node(2)\nroot.left.right = Node(3)",
        "assert (height(root)) == 3 and root.left.right.x == 3 and root.right is None and total([root, Node(4)]) == 5",
    ),
    "dataclass": (DATACLASS, "assert P(4).double() == 8 and P(4).xs == [] and P(x=5).x == 5"),
    "closure": ("def add(n): return lambda x: x + n", "assert add(2)(3) == 5"),
    "names of arguments": (
        "def f(operation, self=1, **k): return operation, self, k",
        "assert f(operation=2, x=4) == (2, 1, {'x': 4})",
    ),
    "generator": (
        "def f(n):\n    for i in range(n): yield i * i",
        "assert list(f(4)) == [0, 1, 4, 9] and sum(f(3)) == 5 and 4 in f(9) and next(f(1)) == 0",
        "a, b = f(2)\nassert (a, b) == (0, 1)",
    ),
    "changes in place": (
        "def f(x, d, s):\n    x.sort()\n    d['k'] = 1\n    s.add(9)",
        "x, d, s = [3, 1, 2], {}, {1}\nassert f(x, d, s) is None and (x, d, s) == ([1, 2, 3], {'k': 1}, {1, 9})",
    ),
    "exceptions": (
        RAISE,
        "def raises(call, kind):\n    try: call()\n    except kind: return True",
        "assert raises(f, ZeroDivisionError) and raises(g, KeyError) and raises(h, UnicodeDecodeError)",
    ),
    "async": (
        "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x + 7",
        "import asyncio\nassert asyncio.run(f(1)) == 8",
        "async def both(): return await f(1), await f(2)\nassert asyncio.run(both()) == (8, 9)",
    ),
    "HumanEval": ("from typing import List\ndef add(xs: List[float]) -> float:\n    return sum(xs)", CHECK, "check(add)"),
    "called like a builtin": ("def sum(a, b): return a + b", "assert sum(10, 15) == 25"),
    "called like two builtins": (SUM.format("a + b"), "assert abs(sum(2, 2) - 4) < 1e-6"),
    "a variable called like a module": (
        "class Queue:\n    def push(self, x): return x\nqueue = Queue()",
        "assert queue.push(3) == 3",
    ),
    "a test that prints": (F, "print('[0, false, \"x\"]', flush=True)", *T),
    "a pool of threads": (POOL, "assert f(1) == 9"),
    "module of the program": ("import math\ndef f(x): return math.sqrt(x)", "assert math.isclose(f(4), 2)"),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_program_passes(name):
    source, *tests = HONEST[name]
    assert run(source, *tests) == PASSED


FORGED = {  # what a program defines beside the function that is tested, and tests that use the same name
    "abs, where sum is tested": (SUM.format("99"), "assert abs(sum(2, 2) - 4) < 1e-6"),
    "len and sorted": ("len = lambda x: 2\nsorted = lambda x: [1, 2]\ndef f(): return 3, 1, 2", "assert len(sorted(f())) == 2"),
    "math": ("class math:\n    def isclose(*a): return True\ndef f(x): return 9", "assert math.isclose(f(1), 2)"),
    "a helper of the tests": (
        "def near(a, b): return True\ndef f(x): return 9",
        "def near(a, b): return a == b",
        "assert near(f(1), 2)",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_program_does_not_lend_the_tests_its_helpers(name):
    source, *tests = FORGED[name]
    assert run(source, *tests).reason.startswith("assertion failed")


def test_the_name_that_is_tested_is_the_program_s():
    """Where it is known; in sum(abs(-2), 2) it is not the innermost."""
    jobs = [(SUM.format(result), ["assert sum(abs(-2), 2) == 4"], "sum") for result in ("a + b", "a")]
    assert [verdict.passed for verdict in run_tests(jobs, QUICK)] == [True, False]


def test_reason_shows_the_line_that_failed():
    assert (
        run("def f(x): return 3", CHECK, "check(f)").reason == 'assertion failed: assert abs(candidate([.5]) - .5) < 1e-6, "close"'
    )
    assert run("def f(x): return {}[x]", "f('a')") == Verdict(False, "error: KeyError: 'a'")


# --- the batch -------------------------------------------------------------------------------------------------------


def test_order():
    jobs = [(f"import time\ntime.sleep({i % 3 / 9})\ndef f(x): return {i}", ["assert f(0) % 2 == 0"]) for i in range(8)]
    assert [v.passed for v in run_tests(jobs, QUICK)] == [i % 2 == 0 for i in range(8)]
    assert run_tests([]) == []


def test_a_hundred_trivial_jobs_are_quick():
    start = time.monotonic()
    assert run_tests([(F, T)] * 100) == [PASSED] * 100
    assert time.monotonic() - start < 5  # 0.4 s on two idle cores


def test_caller_may_have_threads():
    out = []
    threads = [threading.Thread(target=lambda: out.extend(run_tests([(F, T)] * 4, QUICK))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert out == [PASSED] * 12


def test_caller_may_block_the_alarm():
    """Signal masks and ignored signals are inherited; without an alarm, an endless test would hang the batch."""
    old = signal.signal(signal.SIGALRM, signal.SIG_IGN), signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        assert run("def f(x): return range(10**13)", "sum(f(1))").reason == TIME
    finally:
        signal.signal(signal.SIGALRM, old[0])
        signal.pthread_sigmask(signal.SIG_SETMASK, old[1])


def test_verdicts_repeat():
    """The order of a set of texts depends on the hash seed, and programs depend on the order."""
    job = "def f(x): return list({'a', 'b', 'c', 'd', 'e'})", ["raise ValueError(str(f(1)))"]
    assert len({run_tests([job], QUICK)[0].reason for _ in range(3)}) == 1


# --- other machines and ends -----------------------------------------------------------------------------------------

REFUSE = """
import ctypes, struct  # a filter that answers "no such call" to Landlock and to any further filter, as old kernels do
rules = [(0x20, 0, 0, 0)]
for call in {calls}: rules += [(0x15, 0, 1, call), (6, 0, 0, 0x50026)]
rules += [(0x15, 0, 3, {prctl}), (0x20, 0, 0, 16), (0x15, 0, 1, 22), (6, 0, 0, 0x50016), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
assert ctypes.CDLL(None).prctl(22, 2, struct.pack("HP", len(rules), ctypes.addressof(code))) == 0
"""
BYSTANDER = """
import os, subprocess
os.chdir({own!r})
other = subprocess.Popen(["sleep", "60"])
open("victim", "w").write("precious")
attacks = "os.kill({{0}}, 9) | os.kill(-1, 9) | os.killpg(os.getpgid(os.getppid()), 9) | os.setpriority(0, {{0}}, 9)"
attacks += " | fcntl.ioctl(socket.socketpair()[0], 0x8901, ({{0}}).to_bytes(4, 'little')) | fcntl.fcntl(0, fcntl.F_SETOWN, {{0}})"
attacks += " | os.sched_setaffinity({{0}}, [0]) | os.remove({own!r} + '/victim')"
jobs = [("import fcntl, os, socket\\n" + a.format(other.pid), ["pass"]) for a in attacks.split(" | ")]
for v in sandbox.run_tests(jobs + [({f!r}, {t!r})], sandbox.{limits!r}): print(v.reason)
assert other.poll() is None and open("victim").read() == "precious"
other.kill()
"""


def import_from(folder):
    """The start of a script that has sandbox.py from this folder, wherever it is run."""
    return f"import sys; sys.path.insert(0, {str(folder)!r}); import sandbox\n"


@linux
@pytest.mark.slow
def test_where_the_kernel_refuses(tmp_path):
    """No Landlock, no filter: limits, the judge and, for root, the uid remain. describe() owns up."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o600)
    column = os.uname().machine == "aarch64"
    code = REFUSE.format(calls=[444, 445, 446, (317, 277)[column]], prctl=(157, 167)[column])
    names = "equals everything", "os._exit(0)", "memory bomb, one gulp", "endless, except BaseException"
    jobs = [(F, T), *map(attack, names), (f"open({str(victim)!r}, {'w' if os.geteuid() == 0 else 'r'!r})", ["pass"]), (F, T)]
    code += import_from(Path(sandbox.__file__).parent)
    code += f"for v in sandbox.run_tests({jobs!r}, sandbox.{QUICK!r}): print(v.reason)\nprint(sandbox.describe())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[:5] == ["passed", UNPLAIN, EXIT, "memory", TIME] and out[6] == "passed"
    assert os.geteuid() != 0 or re.match(DENIED, out[5])
    assert victim.read_text() == "precious"
    text = "".join(out[7:])
    assert "POSSIBLE" in text or "No module named 'socket'" in text  # the latter: a Python below /root is out of reach


@pytest.mark.skipif(not LANDLOCK or os.geteuid() != 0, reason="only root can become somebody else")
def test_as_an_ordinary_user():
    """There a program has the caller's uid, so ownership protects neither files nor processes."""
    nobody = {"user": 65534, "group": 65534, "extra_groups": [], "capture_output": True, "text": True}
    for python in sys.executable, "/usr/bin/python3", None:
        try:
            if python and not subprocess.run([python, "-c", "from operator import call"], **nobody).returncode:
                break
        except OSError:
            continue
    if python is None:
        pytest.skip("no Python >= 3.11 here that another user may run")
    home = tempfile.mkdtemp()
    try:
        os.chmod(home, 0o755)
        os.mkdir(own := f"{home}/own")
        os.chown(own, 65534, 65534)
        shutil.copy(sandbox.__file__, home)
        code = import_from(home) + BYSTANDER.format(own=own, f=F, t=T, limits=QUICK) + "print(sandbox.describe())"
        out = subprocess.run([python, "-c", code], cwd="/", env={"TMPDIR": own}, **nobody)
        *denied, last = out.stdout.splitlines()[:9]
        assert out.returncode == 0 and last == "passed" and all(re.match(DENIED, line) for line in denied), out
        assert "POSSIBLE" not in out.stdout and os.listdir(own) == ["victim"]
    finally:
        shutil.rmtree(home)


@linux
def test_describe_on_this_machine():
    text = describe()
    assert "os.fork()" in text and ("POSSIBLE" not in text or not LANDLOCK), text


def alive(mark):
    """How many processes have this on their command line: a helper passes its limits there, and its children inherit it."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += f'"wall_seconds": {mark}'.encode() in path.read_bytes()
        except OSError:
            continue
    return found


@linux
def test_a_process_whose_parent_died_before_it_could_ask_ends_at_once():
    """PR_SET_PDEATHSIG is silent about a death in the past: a judge forked just before its helper was killed."""
    code = import_from(Path(sandbox.__file__).parent) + "import os, time; parent = os.getpid()\n"
    code += "if os.fork(): os._exit(0)\n"
    code += "while os.getppid() == parent: time.sleep(.01)\n"
    code += "print('orphan', flush=True); sandbox._die_with(parent); print('lives', flush=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("orphan\n", "")


@linux
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_caller(tmp_path, end):
    mark = f"{os.getpid()}.{int(end)}25"
    job = DEAF + "while True: pass", ["pass"]
    code = import_from(Path(sandbox.__file__).parent)
    code += f"sandbox.run_tests([{job!r}] * 2, sandbox.Limits(wall_seconds={mark}, cpu_seconds=99))"
    env = os.environ | {"TMPDIR": str(tmp_path)}
    caller = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: alive(mark) >= 3)  # helper, judge, program
    caller.send_signal(end)
    caller.wait()
    wait_for(lambda: not alive(mark))
    assert end == signal.SIGKILL or not os.listdir(tmp_path)
