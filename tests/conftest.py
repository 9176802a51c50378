"""What several test files share: small models (random Qwen2 weights in float64 whose embedding table is larger than the
vocabulary in use, as Qwen2.5's is), the steps of a run without its measurements, and one whole run of 20 steps.
"""

import contextlib
import io
import json
import os
import runpy
import sys
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums are added in the same order in every process that a test starts
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import train
from engine import checkpoint, watch
from engine.config import make, parse
from engine.loading import load

ROOT = Path(__file__).parents[1]
VOCAB, ROWS = 37, 48  # tokens in use, rows in the embedding table


def small_model(seed=0, dtype=torch.float64, tied=True):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config).to(dtype).eval()


@pytest.fixture
def model():
    return small_model()


@pytest.fixture(scope="session")
def tiny():
    """The embedded model, loaded once: to be read, not to be changed."""
    return load("tiny", torch.device("cpu"))


CURVES = watch.curves


@pytest.fixture
def no_picture(monkeypatch):
    """Drawing curves.png takes longer than the few steps that a test trains, and most tests do not look at it."""
    monkeypatch.setattr(watch, "curves", lambda *_: None)


class Unwatched:
    """What train.train tells of its steps: nothing is printed or measured; `stop` after that many, as Ctrl-C would."""

    def __init__(self, last):
        self.last, self.stop = last, False

    def after_step(self, run, row, batch):
        self.stop = run.step == self.last


def steps_of(folder, recipe="unisd-star", last=None, **settings):
    """The steps of a run alone: most of a short run's time goes into measuring before and after. -> (Run, rows of the log)

    last=2: stops after step 2, with a checkpoint; resume=True goes on from there.
    """
    cfg = make(recipe, out=str(folder), device="cpu", **settings)
    folder.mkdir(exist_ok=True)
    run = train.start(cfg, folder)
    if cfg.resume:
        checkpoint.restore(run)
    with (folder / "log.jsonl").open("a") as log:
        train.train(run, log, Unwatched(last))
    if last:
        checkpoint.save(run)
    return run, rows_of(folder)


def wait_for(condition, seconds=10):
    """Look again and again until `condition()` holds; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def rows_of(folder):
    """log.jsonl without the seconds, which are never the same."""
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("s_")} for row in rows]


SILENT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # as in a Python without -W


def in_process(folder, script, *flags):
    """`python script flags`, called in that folder, without a new process, which would import torch again.

    -> its exit code, what it printed, what it said on stderr (warnings included)
    """
    out, err, code, dtype = io.StringIO(), io.StringIO(), 0, torch.get_default_dtype()

    def tell(message, category, file, line, *_):
        err.write(warnings.formatwarning(message, category, file, line))

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, *flags])
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # the commands set their own, and we want ours back
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            for category in SILENT:
                warnings.simplefilter("ignore", category)
            warnings.showwarning = tell
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as stop:
                code = stop.code or 0
            finally:
                torch.set_default_dtype(dtype)  # the example of losses.py computes in float64
    return code, out.getvalue(), err.getvalue()


TWENTY = (
    "--recipe unisd-star --steps 20 --batch 4 --micro-batch 2 --contexts 2 --eval-size 1 --train-size 40 --ema-every 2 "
    "--max-new-tokens 20 --save-every 3 --teacher-every 10 --device cpu --sample-every 0"
).split()


@pytest.fixture(scope="session")
def twenty(tmp_path_factory):
    """The folder of a whole run of 20 steps, from the command line's words to curves.png: the one every kill is compared with."""
    out = tmp_path_factory.mktemp("twenty") / "o"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "curves", CURVES)  # made for the first test that asks, which may want no_picture for itself
        train.main(parse([*TWENTY, "--out", str(out)]))
    return out
