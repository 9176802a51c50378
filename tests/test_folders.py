"""What a command is told before it works: where it may write, whose files stay, what a damaged file or a full disk is called."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import in_process
from safetensors import SafetensorError
from safetensors.torch import save_file

import eval as evaluation
import train
from engine import checkpoint, metrics, plan
from engine.config import make, saved_settings
from engine.loading import load
from engine.pretrained import TINY
from experiments import bench, report, study

CPU = torch.device("cpu")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 123\n"
ONE = "--recipe sft --steps 1 --batch 2 --micro-batch 2 --eval-size 1 --train-size 10 --teacher-every 0 --device cpu".split()


def tiny_in(folder):
    return Path(shutil.copytree(TINY, folder))


# --- where nothing can be written -------------------------------------------------------------------------------------


def nowhere(tmp_path, kind):
    """A folder that cannot be made or written, and what is said of it. (A test may run as root, whom no mode keeps out.)"""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    return {
        "file": (tmp_path / "file", "is a file; choose a folder"),
        "below a file": (tmp_path / "file" / "a" / "b", "Not a directory"),
        "dangling": (tmp_path / "dangling", "is a link to nothing"),
        "not ours": (Path("/proc/none/of/ours"), ""),
        "too long": (tmp_path / ("x" * 300), "File name too long"),
    }[kind]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="folders as Linux has them")
@pytest.mark.parametrize("kind", ["file", "below a file", "dangling", "not ours", "too long"])
def test_a_folder_that_cannot_be_written_is_one_line_before_anything_is_loaded(kind, tmp_path, monkeypatch, capsys):
    out, why = nowhere(tmp_path, kind)
    monkeypatch.setattr(train, "start", lambda *_: pytest.fail("began to work"))
    monkeypatch.setattr(metrics, "measure", lambda *_: pytest.fail("began to work"))
    for name, main, argv in (
        ("train.py", train.cli, ["--recipe", "sd", "--out"]),
        ("eval.py", evaluation.main, ["--model", "tiny", "--out"]),
        ("study.py", study.main, ["--quick", "--out"]),
        ("report.py", report.main, []),
    ):
        try:
            code = main([*argv, str(out)])
        except SystemExit as stop:
            code = stop.code
        err = capsys.readouterr().err
        assert code == 2 and err.count("\n") == 1 and err.startswith(f"{name}: ") and f"{out}: {why}" in err, err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_that_cannot_be_written_is_told_before_it_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SECTIONS", {"loss": lambda *_: pytest.fail("began to measure")})
    (tmp_path / "file").touch()
    assert bench.main(["--sections", "loss", "--json", str(tmp_path / "file" / "a.json")]) == 2
    assert f"--json {tmp_path / 'file'}: is a file" in capsys.readouterr().err


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    cfg = make("sd", model="~/m", data="~/d.jsonl", out="~/o")
    assert [cfg.model, cfg.data, cfg.out] == [str(tmp_path / name) for name in ("m", "d.jsonl", "o")]
    assert checkpoint.writable("~/o") == tmp_path / "o" and (tmp_path / "o").is_dir()


def test_nobodys_home_and_a_circle_of_links_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink("circle", "circle")
    for out, why in (("~nobody-of-that-name/x", "home"), ("circle", "is a link to nothing")):
        with pytest.raises(ValueError, match=f"--out {out}: .*{why}"):
            checkpoint.claim(make("sd", out=out))


# --- whose files these are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "README.md", "settings.json", "notes/a.txt"])
def test_a_folder_of_somebody_else_is_not_written_into(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("[1]")
    before = sorted(tmp_path.rglob("*"))
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds no run" if resume else f"is not empty .{name.split('/')[0]}."):
            checkpoint.claim(make("sd", out=str(tmp_path), resume=resume))
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / name).read_text() == "[1]"


def test_the_model_that_is_read_is_no_place_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_in("m")
    os.symlink("m", "same")
    for out, model in (("m", "m"), ("same", "m"), ("m/", "./m"), (str(TINY), "tiny"), ("org/name", "org/name")):
        with pytest.raises(ValueError, match="is the folder of a model that is read"):
            checkpoint.claim(make("sd", model=model, preset="tiny", data="tiny", out=out))
    assert not Path("org").exists() and (tmp_path / "m" / "config.json").read_bytes() == (TINY / "config.json").read_bytes()


def test_an_attempt_that_failed_does_not_block_its_folder(tmp_path):
    """A run that was refused after it had its folder leaves a lock, and sometimes what it had prepared."""
    cfg = make("sd", out=str(tmp_path / "o"))
    checkpoint.claim(cfg)
    (tmp_path / "o" / "manifest.json").write_text("{}")
    (tmp_path / "o" / ".hidden").touch()
    assert checkpoint.claim(cfg) == tmp_path / "o"


@pytest.mark.slow
def test_an_evaluation_replaces_only_what_an_evaluation_wrote(tmp_path):
    command = ["eval.py", "--model", str(TINY), "--size", "1", "--max-new-tokens", "2", "--device", "cpu", "--out"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "answers.jsonl").write_text("of a run")
    code, _, err = in_process(tmp_path, *command, "run")
    assert code == 2 and "--out run holds answers.jsonl, which is of no evaluation" in err
    assert [p.read_text() for p in (tmp_path / "run").iterdir()] == ["of a run"]
    assert in_process(tmp_path, *command, str(TINY))[0] == 2 and not (TINY / "eval.json").exists()
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "notes.txt").write_text("mine")  # nothing that a report would replace
    assert [in_process(tmp_path, *command, "o")[0] for _ in range(2)] == [0, 0]


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_what_git_lfs_left_in_place_of_a_file_is_named(name, tmp_path):
    (tiny_in(tmp_path / "m") / name).write_text(POINTER)
    with pytest.raises(ValueError, match=f"--model .*{name} is a Git LFS pointer.*git lfs pull"):
        load(str(tmp_path / "m"), CPU)


@pytest.mark.parametrize("size", [0, 100, 100_000])
@pytest.mark.parametrize("finished", [False, True])
def test_weights_that_were_cut_short_are_one_line(size, finished, tmp_path, capsys):
    file = tiny_in(tmp_path / "m") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    if finished:  # of a run: it has finished, so --resume would be the wrong advice
        (tmp_path / "m" / "settings.json").write_text("{}")
    assert (
        train.cli([*ONE, "--model", str(tmp_path / "m"), "--preset", "tiny", "--data", "tiny", "--out", str(tmp_path / "o")]) == 2
    )
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "does not hold a usable Hugging Face checkpoint" in err and "copy it again" in err


def test_a_damaged_adapter_is_one_line(tmp_path, tiny):
    pytest.importorskip("peft")
    lm = load("tiny", CPU)
    lm.add_lora(2, 4, 0.0)
    for i, (name, content) in enumerate(
        [("adapter_model.safetensors", "x"), ("adapter_config.json", "{}"), ("adapter_config.json", "[")]
    ):
        lm.save(tmp_path / str(i))
        (tmp_path / str(i) / name).write_text(content)
        with pytest.raises(ValueError, match=f"--model {tmp_path / str(i)}: (the folder|its adapter and base)"):
            load(str(tmp_path / str(i)), CPU)


def test_an_adapter_that_would_be_half_of_itself_is_one_line(tmp_path):
    pytest.importorskip("peft")
    lm = load("tiny", CPU)
    lm.add_lora(2, 4, 0.0)
    lm.save(folder := tmp_path / "a")
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for values in (dict(layers_to_transform=[0], target_modules=["q_proj"]), dict(target_modules=["q_proj"])):
        (folder / "adapter_config.json").write_text(json.dumps(settings | values))
        with pytest.raises(ValueError, match=f"--model {folder}: .*weights that adapter_config.json does not ask for"):
            load(str(folder), CPU)


def test_weights_that_are_pickled_are_told_how_to_be_saved(tmp_path):
    folder = tiny_in(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="copy it again whole, with its weights as safetensors"):
        load(str(folder), CPU)


def test_a_plan_for_a_model_that_is_none_is_one_line(tmp_path):
    for content in (POINTER, "{}", '{"model_type": "none such"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=f"--model {tmp_path}: "):
            plan.size_of(str(tmp_path))


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors"])
def test_a_damaged_checkpoint_is_named_and_what_to_do(name, tmp_path, tiny):
    folder = tiny_in(tmp_path / "checkpoint-3")
    torch.save({"factors": {}, "step": 3}, folder / "state.pt")
    assert checkpoint.read_back(folder, type(tiny.model))[0]["step"] == 3
    for content in (b"", b"PK", (folder / name).read_bytes()[:-50]):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match="--resume: .*checkpoint-3 is damaged .*delete that folder"):
            checkpoint.read_back(folder, type(tiny.model))


def test_damaged_settings_are_named(tmp_path, capsys):
    (tmp_path / "settings.json").write_text('{"recipe": ')
    assert train.cli(["--out", str(tmp_path), "--resume"]) == 2
    assert f"{tmp_path}/settings.json cannot be read" in capsys.readouterr().err
    (tmp_path / "settings.json").write_text('{"editor": "of somebody else"}')
    assert saved_settings(str(tmp_path)) == {}


# --- a full disk, a full memory, a terminal that is gone ---------------------------------------------------------------


@pytest.mark.parametrize("who", ["python", "safetensors", "torch"])
def test_whoever_meets_the_full_disk_says_the_same(who, tmp_path):
    resource = pytest.importorskip("resource")
    limits, tensors = resource.getrlimit(resource.RLIMIT_FSIZE), {"a": torch.zeros(100_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no file gets longer: a disk that is full, to who writes it
    try:
        with pytest.raises(checkpoint.DiskFull, match="disk is full .*: it was not written; .*--resume"), checkpoint.disk("it"):
            if who == "torch":
                torch.save(tensors, tmp_path / "a")
            elif who == "safetensors":
                save_file(tensors, tmp_path / "a")
            else:
                with (tmp_path / "a").open("w") as log:  # raises when it is flushed, and again when it is closed
                    log.write("x" * 60_000)
                    log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_log_on_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "before_training", lambda *_: {})
    (tmp_path / ".lock").touch()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    assert train.cli([*ONE, "--out", str(tmp_path)]) == 2
    assert "train.py: the disk is full" in capsys.readouterr().err.splitlines()[-1]


def test_what_is_ours_keeps_its_traceback():
    for error in (RuntimeError("shapes"), TypeError("None")):
        with pytest.raises(type(error)), checkpoint.disk("it"):
            raise error
        with pytest.raises(type(error)):
            checkpoint.complain("train.py", error, "memory")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_full_memory_is_one_line_on_every_device(error, capsys):
    assert checkpoint.complain("eval.py", error, "lower --sample-batch") == 2
    assert capsys.readouterr().err == "eval.py: lower --sample-batch\n"


def test_other_libraries_errors_are_one_line(capsys):
    for error in (SafetensorError("header too large"), PermissionError(13, "Permission denied"), ValueError("--lr")):
        assert checkpoint.complain("train.py", error, "memory") == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_the_perplexity_of_a_model_that_has_fallen_apart_is_infinite(tiny, monkeypatch):
    monkeypatch.setattr(metrics, "sampled_logps", lambda states, said, *_: torch.full(said.shape, -1e4))
    ids = torch.tensor([[5, 6]])
    assert metrics.perplexity(tiny, [[3, 4]], ids, torch.ones_like(ids)) == float("inf")
    assert json.loads(json.dumps({"retention_ppl": float("inf")}))["retention_ppl"] == float("inf")  # as summary.json keeps it
