"""subprocess_judge.py - judge programs where sandbox.py cannot cage them: Windows, macOS, any place without fork() or prctl().

The judge, the program and the questions between them are the sandbox's, so a program that prints "passed" or exits with 0
fails here too: no verdict passes through its hands. What is missing is the cage: it can do what you can, until its time is up.
sandbox.py is loaded by its path, as a program could import what lay on the import path.   Try it:  pytest tests/test_platform.py
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial


@cache  # so: once
def _warn() -> None:
    told = f"no isolation here ({sys.platform}): a model's code runs in a subprocess with a time limit, and can do what you can"
    warnings.warn(f"{told}; on Linux tasks/sandbox.py isolates it", stacklevel=2)


def judge_all(jobs, limits: dict, env: dict):
    """(passed, reason) of each job, in order: the values of a sandbox.Verdict. As many at a time as there are cores."""
    _warn()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(partial(_judged, limits=limits, env=env), jobs)


def _judged(job: tuple, limits: dict, env: dict) -> tuple[bool, str]:
    """Start a judge for one job, in a folder of its own, and hear its verdict."""
    command = [sys.executable, "-SsPB", os.path.abspath(__file__), json.dumps(limits), "judge"]
    folder = tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True)
    # Suppressed: folders that a program nested deeper than Python recurses; they stay.
    with contextlib.suppress(RecursionError), folder as home, tempfile.TemporaryFile() as question:
        question.write(json.dumps([job[0], "\n".join(job[1]), *job[2:]]).encode())
        question.seek(0)
        pipes = dict(stdin=question, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        env = env | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), home)
        with subprocess.Popen(command, cwd=home, env=env, **pipes) as judge:
            alarm = threading.Timer(limits["wall_seconds"] + 1, _kill_tree, [judge])  # 1: two Pythons have to start
            alarm.start()
            try:
                line = judge.stdout.readline()
            finally:
                alarm.cancel()
                _kill_tree(judge)
    return tuple(json.loads(line)) if line else (False, "timeout")


def _kill_tree(judge: subprocess.Popen) -> None:
    """End the judge, its program, and what that has started, as far as the platform lets us find it."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(judge.pid, signal.SIGKILL)
        else:
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(judge.pid)], capture_output=True, check=False)
    judge.kill()


# --- the two processes -----------------------------------------------------------------------------------------------
def _judge(sandbox, limits) -> None:
    """Start the program, *then* read the job, and answer [passed, reason]."""
    hear, tell = os.pipe()  # `hear` stays open here too: a program that is gone gives no answer, but no error either
    program = subprocess.Popen([sys.executable, "-SsPB", *sys.argv[:2], "program"], stdin=hear, stdout=subprocess.PIPE, text=True)
    job = json.loads(sys.stdin.buffer.read())
    verdict = sandbox._run(program.stdout, os.fdopen(tell, "w"), limits, program.kill, program.wait, *job)
    os.write(1, json.dumps(verdict).encode() + b"\n")
    time.sleep(5)  # the caller ends us; while we are here, it finds what our program has started


def _program(sandbox, limits) -> None:
    """Keep the pipes to the judge aside, and do what the judge asks."""
    hear, answer = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nothing, fd)
    sandbox._program(hear, answer)


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("sandbox", os.path.join(os.path.dirname(__file__), "sandbox.py"))
    spec.loader.exec_module(sandbox := importlib.util.module_from_spec(spec))
    (_judge if sys.argv[2] == "judge" else _program)(sandbox, sandbox.Limits(**json.loads(sys.argv[1])))
