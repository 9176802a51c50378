"""sandbox.py - run a stranger's (a language model's) Python against test statements, and survive.

A *helper* (one clean interpreter per batch) forks a *judge* per job, which runs the tests and forks the *program*. Between
these two only plain data (numbers, text, lists, dicts ...) crosses a pipe: the judge asks "call f with 1" and hears "8"; all
else stays in the program and goes by a number. So == compares what the judge decoded, and the program never holds a test, an
expected value, or anything that means "passed": there is no verdict in it to forge.

Not like the official code, which calls exec() in the scoring process behind an alarm: there sys.exit() ends the evaluation,
`while True: try ... except Exception` swallows the alarm for ever, an object whose __eq__ is always True passes, and nothing
limits memory, files, network or processes.

Protected on Linux, alike as root, as a user and in a container: files (Landlock: read Python and the system's libraries, write
one private folder), network, other processes and starting any (a system-call filter), the environment (empty), time, memory,
file size, threads (limits); root is given up. Namespaces would hide more, but containers and Ubuntu refuse them, and then one
needs all this anyway. `describe()` tries attacks and tells what is blocked *here*: before Linux 5.13 only the change of uid
guards files, for root alone; on macOS only the limits remain.

Not protected: the kernel, so this is no boundary for hostile code from the internet (use a VM); many small files can fill a
disk; the jobs of an ordinary user share one allowance of threads. A program answers for its own objects (`if f(x)`,
`Node(1).left`), but == with one raises unless it is plain data at heart (a list's subclass). It may know a public benchmark by
heart. Tests cannot give lambdas to the program, subclass or `except` its classes, or use `f(x) is x`.

Standard library only.   Try it:  python sandbox.py   (tries the attacks here)   python -m pytest tests/test_sandbox.py -q
"""

import ast
import builtins
import contextlib
import ctypes
import io
import json
import operator
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass

LINUX = sys.platform == "linux"


@dataclass(frozen=True)
class Limits:
    wall_seconds: float = 10.0  # per job, program and tests together
    cpu_seconds: int = 10  # of the program, and again of its tests
    memory_mb: int = 1024  # address space, likewise
    file_mb: int = 1  # the largest file
    processes: int = 8  # threads, the first included; starting processes is forbidden
    output_bytes: int = 8_000_000  # the longest answer to one question of a test; what is printed goes nowhere


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reason: (
        str  # one printable line, at most 200 characters: "passed", "assertion failed: ...", "timeout", "error: ..."
    )


def run_tests(
    jobs: Sequence[tuple[str, Sequence[str]]], limits: Limits = Limits(), progress: bool = False
) -> list[Verdict]:
    """Run each (program, test statements); verdicts in the same order. A job can fail only itself, never another.

    Tests run in order and share their names; a name they do not define is the program's. No tests: not passed.
    Raises NotImplementedError on Windows.
    """
    if not hasattr(os, "fork"):
        raise NotImplementedError("the sandbox needs fork(): use Linux, macOS, or WSL on Windows")
    verdicts = [Verdict(False, "error: the sandbox helper died")] * len(jobs)
    home = tempfile.mkdtemp(prefix="sandbox-")
    os.chmod(home, 0o711)  # jobs with another uid must be able to pass through
    command = [sys.executable, "-S", "-s", "-P", "-B", os.path.abspath(__file__), "--serve"]
    # No -E, on purpose: the environment holds only this, and a fixed hash seed makes verdicts repeatable.
    env = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    env |= {k: v for k, v in os.environ.items() if k in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")}  # to find libpython
    try:
        # Jobs wait in a file without a name, not in the helper: every program would inherit its memory, tests included.
        with tempfile.TemporaryFile() as spool:
            places = []
            for source, tests in jobs:
                places.append((spool.tell(), spool.write(json.dumps([source, list(tests)]).encode())))
            spool.flush()
            order = dict(limits=asdict(limits), spool=spool.fileno(), home=home, places=places)
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[spool.fileno()])
            # A new program, never fork(): the caller may have threads, and torch.
            with subprocess.Popen(command, env=env, cwd="/", start_new_session=True, **pipes) as helper:
                try:
                    helper.stdin.write(json.dumps(order).encode() + b"\n")
                    helper.stdin.close()
                    for done, line in enumerate(helper.stdout, 1):
                        index, passed, reason = json.loads(line)
                        verdicts[index] = Verdict(passed, reason)
                        if progress:
                            print(f"\rsandbox {done}/{len(jobs)} jobs", end="", file=sys.stderr, flush=True)
                finally:
                    helper.kill()  # for Ctrl-C; judges and programs ask the kernel to die with it
    finally:
        subprocess.run(["rm", "-rf", home])  # not shutil.rmtree: a program may nest folders deeper than Python recurses
    return verdicts


def describe() -> str:
    """Try some attacks on this machine; a line for each says how it ended."""
    attacks = {
        "read your files": "open('/etc/passwd')",
        "write to /tmp": "os.close(os.open('/tmp', os.O_WRONLY | os.O_TMPFILE))",
        "read your environment": "open(f'/proc/{os.getppid()}/environ')",
        "signal your processes": "os.kill(os.getppid(), 0)",
        "start a process": "os.fork()",
        "open a socket": "__import__('socket').socket()",
        "take 2 GB of memory": "bytearray(2 << 30)",
        "stay root": "assert os.getuid() == 0",
    }
    verdicts = run_tests([(f"import os\n{attack}", ["pass"]) for attack in attacks.values()])
    return "\n".join(f"{k:24}{'POSSIBLE' if v.passed else v.reason}" for k, v in zip(attacks, verdicts, strict=True))


# --- the helper ------------------------------------------------------------------------------------------------------

PRELOAD = "asyncio bisect copy fractions hashlib heapq math queue random re statistics string textwrap threading typing"


def _serve() -> None:
    """Read one order from stdin, answer one JSON line per job, in any order: [index, passed, reason]."""
    order = json.loads(sys.stdin.buffer.readline())
    limits, waiting, running = Limits(**order["limits"]), list(enumerate(order["places"]))[::-1], {}
    out, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for fd in 0, 1, 2:
        os.dup2(null, fd)
    os.environ.clear()
    for name in PRELOAD.split():  # what many programs import: cheaper once here than once per job
        __import__(name)
    slots, uid, threads = list(range(os.cpu_count() or 1)), 0, limits.processes
    if os.geteuid() == 0:
        uid = 0x40000000 + os.getpid() % 0x100000 * 1024  # + slot: nobody else's
    elif LINUX:  # RLIMIT_NPROC counts all threads of the user; this counts those of all users, which is near enough
        threads += 2 * len(slots) + int(open("/proc/loadavg").read().split("/")[1].split()[0])
    if LINUX:
        _c("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the caller
        _c("prctl", 36, 1)  # PR_SET_CHILD_SUBREAPER: when a judge dies, its program becomes our child
    while waiting or running:
        while waiting and slots:
            index, place = waiting.pop()
            slot, (hear, tell) = slots.pop(), os.pipe()
            judge = os.fork()
            if judge == 0:
                _judge(limits, (limits, threads, uid and uid + slot, order["home"]), order["spool"], place, tell)
            os.close(tell)
            running[judge] = index, slot, hear
        pid, status = os.wait()
        if pid in running:
            index, slot, hear = running.pop(pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # the program, which the filter keeps in the judge's process group
            verdict, code = os.read(hear, 65536), os.waitstatus_to_exitcode(status)
            os.close(hear)
            slots.append(slot)
            lost = [False, "timeout" if code in (-signal.SIGALRM, -signal.SIGXCPU) else f"killed: the judge, {code}"]
            os.write(out, json.dumps([index, *(json.loads(verdict) if verdict else lost)]).encode() + b"\n")


# --- the cage: judge and program give up what they do not need, for good ---------------------------------------------

READABLE = "/lib /lib64 /usr/lib /usr/lib64 /usr/local/lib /nix/store /etc/ld.so.cache /dev/null /dev/urandom /dev/zero"
# System calls that reach beyond the process, and that Landlock leaves alone: their numbers on x86_64 and aarch64.
DENIED = """fork 57 -1 vfork 58 -1 execve 59 221 execveat 322 281 kill 62 129 tkill 200 130 tgkill 234 131 socket 41 198
rt_sigqueueinfo 129 138 rt_tgsigqueueinfo 297 240 pidfd_open 434 434 setsid 112 157 setpgid 109 154 ptrace 101 117
process_vm_readv 310 270 process_vm_writev 311 271 process_madvise 440 440 prlimit64 302 261 io_uring_setup 425 425
unshare 272 97 setns 308 268 shmget 29 194 semget 64 190 msgget 68 186 mq_open 240 180 memfd_create 319 279 bpf 321 280
userfaultfd 323 282 perf_event_open 298 241 keyctl 250 219 add_key 248 217 request_key 249 218 truncate 76 45 prctl 157 167
chmod 90 -1 fchmodat 268 53 fchmodat2 452 452 chown 92 -1 lchown 94 -1 fchownat 260 54 utime 132 -1 utimes 235 -1
futimesat 261 -1 utimensat 280 88 setxattr 188 5 lsetxattr 189 6 removexattr 197 14 lremovexattr 198 15"""


def _c(name: str, *args) -> int:
    """A C library call that raises OSError where C returns -1."""
    result = ctypes.CDLL(None, use_errno=True)[name](*[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _enter(limits: Limits, threads: int, uid: int, home: str) -> None:
    """Limits, then another uid if we are root, then Landlock, then the filter: each takes away what the last one needed."""
    import resource  # absent on Windows

    folder = f"{home}/{os.getpid()}"
    os.mkdir(folder, 0o700)
    os.chdir(folder)
    os.environ["TMPDIR"] = folder
    cpu, memory, size = limits.cpu_seconds, limits.memory_mb << 20, limits.file_mb << 20
    for name, value in dict(AS=memory, FSIZE=size, CPU=cpu, NPROC=threads, NOFILE=64, CORE=0).items():
        with contextlib.suppress(ValueError, OSError):  # macOS refuses AS
            resource.setrlimit(
                vars(resource)[f"RLIMIT_{name}"], (value, value + (name == "CPU"))
            )  # SIGXCPU, then SIGKILL
    if uid:
        os.chown(folder, uid, uid)
        if LINUX:
            _c("prctl", 8, 1)  # PR_SET_KEEPCAPS
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    if LINUX:
        for option, value in (4, 0), (1, signal.SIGKILL), (38, 1):  # PR_SET_DUMPABLE, _PDEATHSIG, _NO_NEW_PRIVS
            _c("prctl", option, value, 0, 0, 0)
        landlock = _landlock(folder)
        # A Python below /root (0700) is closed to other users. CAP_DAC_OVERRIDE opens it; Landlock keeps the rest closed.
        capabilities = 2 if uid and landlock and not os.access(os.__file__, os.R_OK) else 0
        _c("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", capabilities, capabilities, 0, 0, 0, 0))
        _filter()


def _landlock(folder: str) -> bool:
    """Files: write only below `folder`, read only Python and the system's libraries. False: the kernel has no Landlock."""
    with contextlib.suppress(OSError):
        abi = _c("syscall", 444, None, 0, 1)
        every = (1 << min(12 + abi, 15)) - 1  # 13 rights at first, then one for moving files, then one for truncating
        handled = struct.pack("3Q", every, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]  # TCP; signals, sockets
        rules = _c("syscall", 444, handled, len(handled), 0)
        read_only = {*READABLE.split(), f"{sys.base_prefix}/lib", os.path.dirname(os.__file__)}
        for path in filter(os.path.exists, [folder, *read_only]):
            rights = every if path == folder else 12 if os.path.isdir(path) else 6  # 2 write, 4 read a file, 8 a folder
            fd = os.open(path, os.O_PATH)
            _c("syscall", 445, rules, 1, struct.pack("=QI", rights, fd), 0)
            os.close(fd)
        _c("syscall", 446, rules, 0)
        os.close(rules)
        return True
    return False


def _filter() -> None:
    """The kernel answers EPERM to DENIED, and to calls that depend on an argument. On an unknown machine: no filter."""
    machine = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)
    if machine is None:
        return
    load, equal, bit, least, end = 0x20, 0x15, 0x45, 0x35, 6  # classic BPF: (what, lines to skip if so, if not, value)
    allow, deny = 0x7FFF0000, 0x50001
    code = [(load, 0, 0, 4), (equal, 1, 0, (0xC000003E, 0xC00000B7)[machine]), (end, 0, 0, deny), (load, 0, 0, 0)]
    code += [(least, 0, 1, 0x40000000), (end, 0, 0, deny)]  # these two lines: no 32-bit calls
    for number in DENIED.split()[1 + machine :: 3]:
        code += [(equal, 0, 1, int(number) & 0xFFFFFFFF), (end, 0, 0, deny)]
    code += [(equal, 0, 1, 435), (end, 0, 0, 0x50026)]  # clone3 hides its flags: "no such call", so libc takes clone
    code += [
        (equal, 0, 3, (56, 220)[machine]),
        (load, 0, 0, 16),
        (bit, 1, 0, 0x10000),
        (end, 0, 0, deny),
    ]  # threads only
    code += [
        (load, 0, 0, 0),
        (equal, 0, 3, (72, 25)[machine]),
        (load, 0, 0, 24),
        (bit, 0, 1, 8),
        (end, 0, 0, deny),
    ]  # fcntl
    code = b"".join(struct.pack("HBBI", *line) for line in [*code, (end, 0, 0, allow)])
    buffer = ctypes.create_string_buffer(code)
    _c("prctl", 22, 2, struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)))  # PR_SET_SECCOMP
