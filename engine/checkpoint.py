"""checkpoint.py - a run that survives: its folder, its state, and how it goes on bit for bit.

Saved in <out>/checkpoint-<step>/: the model as an ordinary Hugging Face folder (fp32 safetensors) and state.pt with the EMA, the
optimizer, the step (which is the schedule and the data cursor, both pure functions of it), torch's random states (a run draws from
no others) and the settings. A folder is written under another name, flushed to disk and renamed: it is there whole or not at all.
state.pt is read with weights_only=True: nothing is unpickled that could run code. It exists because long runs are killed.
What 2 processes wrote is resumed by 1, and the other way round.

Depends on config.py, parallel.py, ema.py (through the run it is given).   Try it:  python -m pytest tests/test_resume.py -q
"""

import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path

import torch
from safetensors import SafetensorError

from engine import any_console, parallel
from engine.config import Config, flag, saved_settings
from engine.pretrained import SHORT

try:
    import fcntl
except ImportError:  # Windows: there a folder is not locked
    fcntl = None

# Settings that may change at --resume: they alter what is watched or where it runs, not what is computed.
FREE = "resume out device shard save_every sample_every sample_batch chunk micro_batch max_tokens_per_pass".split()
FREE += ["grad_checkpointing"]
HELD: dict[Path, int] = {}  # folder -> the descriptor of its lock file, open as long as the process lives


def writable(path: str | Path, flag: str = "--out", models: tuple = ()) -> Path:
    """A folder to write into, made if it is missing and tried at once; better now than when hours of work want to be kept.

    Raises ValueError if nothing can be written there, or if it is the folder of one of the `models` that are read: even an empty
    one of that name would hide the hub's.
    """
    try:
        path = Path(path).expanduser()
        if any(model and os.path.realpath(SHORT.get(model, model)) == os.path.realpath(path) for model in models):
            raise OSError(0, "is the folder of a model that is read")
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError, RuntimeError) as error:  # the last two: a zero byte in a name, `~` without a home
        why = "is a file" if os.path.isfile(path) else getattr(error, "strerror", None) or error
        why = "is a link to nothing" if os.path.islink(path) and not os.path.exists(path) else why
        raise ValueError(f"{flag} {path}: {why}; choose a folder that can be written") from error
    return path


def command(name: str, memory: str = "", stopped: str = "stopped") -> Callable:
    """Around a `main(argv) -> exit code`: one clear line instead of a traceback for all that a user can fix, then code 2; 130 where
    it was stopped, so that what follows in a script does not take it for finished.
    """

    def around(main: Callable) -> Callable:
        @wraps(main)
        def guarded(argv: list[str] | None = None) -> int:
            any_console()
            warnings.formatwarning = lambda message, *_, **__: f"{name}: {message}\n"
            try:
                return main(argv)
            except KeyboardInterrupt:
                print(f"{name}: {stopped}", file=sys.stderr)
                return 130
            except Exception as error:
                return complain(name, error, memory)

        return guarded

    return around


def complain(command: str, error: Exception, memory: str) -> int:
    """One line on stderr about what a user can fix. -> the exit code 2. Anything else is a mistake of ours and raised again.

    memory: what helps where the device, or the machine, is out of memory.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        error = memory
    elif isinstance(error, BrokenPipeError):  # Python must not try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        error = "nobody reads its output any more (a closed pipe): write it to a file, and start again or go on"
    elif not isinstance(error, ValueError | FloatingPointError | OSError | SafetensorError):
        raise error
    print(f"{command}: {error}", file=sys.stderr)
    return 2


def claim(cfg: Config) -> Path:
    """Make --out this run's folder, and keep others out while it runs. Raises ValueError if it is another run's, or in use, or if
    there is nothing that --resume could go on with, or only under other settings.
    """
    out, saved = Path(cfg.out), saved_settings(cfg.out)
    if saved and not cfg.resume:
        raise ValueError(f"--out {out} holds another run: add --resume to go on with it, or choose another folder")
    if cfg.resume and not saved:
        raise ValueError(f"--resume: {out} holds no run; check --out, or start without --resume")
    for name, value in asdict(cfg).items():
        if name not in FREE and name in saved and value not in (saved[name], "auto", ""):  # else the log would be of two runs
            raise ValueError(f"{flag(name)} is {value!r} here and {saved[name]!r} in {out}: leave it out, or choose another --out")
    theirs = sorted(p.name for p in writable(out, models=(cfg.model,)).iterdir() if not p.name.startswith("."))
    # A lock without settings is an attempt of ours that ended before its run began.
    if theirs and not saved and not (out / ".lock").exists():
        raise ValueError(f"--out {out} is not empty ({', '.join(theirs[:3])}{', ...' * (len(theirs) > 3)}): choose an empty folder")
    if out in HELD:
        os.close(HELD.pop(out))
    HELD[out] = os.open(out / ".lock", os.O_CREAT | os.O_WRONLY)
    try:
        if fcntl:
            fcntl.flock(HELD[out], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out}: another process is at work there; let it finish, or stop it first") from None
    except OSError:  # a file system without locks
        pass
    for leftover in out.glob(".writing-*"):  # a save that was killed half way
        shutil.rmtree(leftover, ignore_errors=True)
    return out


def check_data(out: Path, manifest: dict) -> None:
    """Refuse to go on with another file of questions: its answers would mix with the old ones'. Raises ValueError."""
    path = out / "manifest.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    if saved.get("sha256", manifest.get("sha256")) != manifest.get("sha256"):
        raise ValueError(f"--data {manifest['data']} has changed since the run in {out} began: put it back, or change --out")


def room_for(out: Path, parameters: int) -> None:
    """Raises ValueError if two checkpoints (the old one goes only when the new one stands) do not fit on the disk."""
    need, free = 2 * 4 * 4 * parameters + 50_000_000, shutil.disk_usage(out).free  # weights, EMA and two Adam moments in fp32
    if free < need:
        raise ValueError(f"--out {out}: {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB needed for checkpoints; choose another disk")


class DiskFull(OSError):
    """Nothing could be written any more; what stood before still stands."""


@contextmanager
def disk(what: str, fix: str = "the last checkpoint is whole: free space and --resume"):
    """Turn a full disk, or one that is gone or read-only, into one clear line, whoever was writing."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        torchs = "inline_container" in str(error) or "PytorchStreamWriter" in str(error)  # its writer raises the plain class
        if isinstance(error, DiskFull | BrokenPipeError) or (isinstance(error, RuntimeError) and not torchs):
            raise
        why = "a file was cut short" if torchs else getattr(error, "strerror", None) or error
        raise DiskFull(f"the disk is full or refuses ({why}): {what} was not written; {fix}") from error


def write_json(path: Path, value) -> None:
    """Written under another name, then renamed: never half a file. Of several processes, only rank 0 writes."""
    if parallel.rank():
        return
    new = path.with_name(path.name + ".new")
    with disk(path.name):
        new.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(new, path)


def save(run) -> None:
    """Write checkpoint-<step>, then remove the older ones. Every rank must call it; rank 0 writes."""
    out = Path(run.cfg.out)
    new, final = out / f".writing-{run.step}", out / f"checkpoint-{run.step}"
    weights, state = whole_weights(run.lm.model), state_of(run)
    if run.ranks.rank == 0:
        try:
            with disk(final.name):
                run.lm.save(new, weights)
                torch.save(state, new / "state.pt")
                for file in new.iterdir():
                    with file.open("r+b") as f:
                        os.fsync(f.fileno())
                shutil.rmtree(final, ignore_errors=True)
                os.replace(new, final)
        finally:  # it is still there if it could not be finished
            shutil.rmtree(new, ignore_errors=True)
        for old in all_checkpoints(out)[:-1]:
            shutil.rmtree(old, ignore_errors=True)
    run.ranks.wait()


def whole_weights(model) -> dict | None:
    """The whole model's weights where they are sharded; None where they lie in it anyway."""
    sharded = any(isinstance(p, parallel.DTensor) for p in model.parameters())
    return {n: parallel.full(t) for n, t in model.state_dict().items()} if sharded else None


def state_of(run) -> dict:
    """All of a run but its weights, as one process would hold it: whole tensors, named after their parameters."""
    cuda = torch.cuda.get_rng_state(run.lm.device) if run.lm.device.type == "cuda" else None
    moments = lambda p: {k: parallel.full(v) for k, v in run.optimizer.state[p].items()}
    average = run.average and run.average.state_dict() | {"shadow": {n: parallel.full(t) for n, t in run.average.shadow.items()}}
    trained = {n: p for n, p in run.lm.model.named_parameters() if p.requires_grad}
    return {
        "settings": asdict(run.cfg),
        "step": run.step,
        "optimizer": {n: moments(p) for n, p in trained.items() if p in run.optimizer.state},
        "ema": average,
        "scaler": run.scaler.state_dict(),
        "factors": {n: p.data for n, p in trained.items()} if run.lm.adapter else {},
        "rng": run.ranks.objects({"torch": torch.get_rng_state(), "cuda": cuda}),
    }


def all_checkpoints(out: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and (p / "state.pt").exists()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def restore(run) -> None:
    """Put the last checkpoint's state into a freshly built run, and cut the log back to it; without one, start over from step 0."""
    out, device = Path(run.cfg.out), run.lm.device
    if found := all_checkpoints(out):
        model = run.lm.model
        state, weights = read_back(found[-1], type(model), model.dtype)
        own, parameters = model.state_dict(), dict(model.named_parameters())
        model.load_state_dict({n: parallel.like(t, own[n]) for n, t in weights.items()}, strict=not state["factors"])
        for n, moments in state["optimizer"].items():
            place = lambda v, p=parameters[n]: parallel.like(v, p) if v.shape == p.shape else v.to(p.device)
            run.optimizer.state[parameters[n]] = {k: place(v) for k, v in moments.items()}
        if run.average:
            shadow = {n: parallel.like(t, run.average.shadow[n]) for n, t in state["ema"]["shadow"].items()}
            run.average.load_state_dict(state["ema"] | {"shadow": shadow})
        run.scaler.load_state_dict(state["scaler"])
        run.step = state["step"]
        if len(state["rng"]) == run.ranks.size:  # else: other ranks than before have other random states (dropout)
            rng = state["rng"][run.ranks.rank]
            torch.set_rng_state(rng["torch"])
            if device.type == "cuda" and rng["cuda"] is not None:
                torch.cuda.set_rng_state(rng["cuda"], device)
    log, new = out / "log.jsonl", out / "log.jsonl.new"
    if run.ranks.rank == 0 and log.exists():
        rows = re.finditer(r'^\{"step": (\d+).*\}$', log.read_text(), re.MULTILINE)  # a kill may have cut the last
        with disk(log.name):
            new.write_text("".join(row[0] + "\n" for row in rows if int(row[1]) <= run.step))
            os.replace(new, log)
    run.ranks.wait()


def read_back(folder: Path, kind: type, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    """A checkpoint's state and weights, the model being of this kind and dtype. Raises ValueError if it is damaged."""
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        return state, state["factors"] or kind.from_pretrained(folder, dtype=dtype).state_dict()
    except Exception as error:  # zip, pickle and safetensors: each has its own
        why = (str(error) or type(error).__name__).splitlines()[0]
        fix = "put back a whole copy, or delete that folder, and --resume begins again at step 0"
        raise ValueError(f"--resume: {folder} is damaged ({why}): {fix}") from error


def save_final(run) -> None:
    """The trained model, loadable as --model <out>; the checkpoints have served. settings.json stays: the folder is taken."""
    out, weights = Path(run.cfg.out), whole_weights(run.lm.model)
    if run.ranks.rank:
        return
    new = out / ".writing-final"
    with disk("the trained model"):
        run.lm.save(new, weights)
        for file in new.iterdir():
            os.replace(file, out / file.name)
        new.rmdir()


def clear(out: Path) -> None:
    """A finished run needs its checkpoints no more: its model lies in <out> itself."""
    for folder in all_checkpoints(out):
        shutil.rmtree(folder, ignore_errors=True)
    if out in HELD:
        os.close(HELD.pop(out))  # Windows does not delete what is open
    shutil.rmtree(out / ".answers", ignore_errors=True)
    for leftover in ("before.json", ".lock"):
        (out / leftover).unlink(missing_ok=True)


def save_bad_batch(run, batch, loss: float, norm: float) -> str:
    """Keep the batch that broke the loss, so it can be looked at. -> the message to raise with."""
    path = Path(run.cfg.out) / f"bad-batch-step{run.step + 1}.json"
    tok = run.lm.tokenizer
    rows = [
        {"prompt": tok.decode(s), "teacher": tok.decode(t), "ids": ids[m.bool()].tolist(), "completion": tok.decode(ids[m.bool()])}
        for s, t, ids, m in zip(batch.student, batch.teacher, batch.ids, batch.mask, strict=True)
    ]
    rows = sum(run.ranks.objects(rows), [])  # every process' share
    write_json(path, {"step": run.step + 1, "loss": repr(loss), "grad_norm": repr(norm), "settings": asdict(run.cfg), "rows": rows})
    said = f"step {run.step + 1}: the loss is {loss} and the gradient norm {norm}; the weights were not updated"
    return f"{said}. The batch is in {path}. Try a lower --lr, a --clip, or --dtype fp32, in a new --out"
