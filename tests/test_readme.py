"""What the README says can be done is done here, with fewer steps; what it says of the files is true."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.jsonl import load_jsonl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FEWER = {  # script -> flags that make it quick
    "train.py": "--steps 2 --batch 4 --micro-batch 4 --eval-size 1 --train-size 50 --teacher-every 0 --device cpu",
    "eval.py": "--size 1 --device cpu",
    "tiny.py": "--steps 1 --out tiny-again",
    "bench.py": "--repeats 1 --tokens 64 --vocab 500 --prompts 4 --device cpu",
    "study.py": "--recipes sd --seeds 1 --train --steps 1 --batch 2 --eval-size 1 --train-size 50 --teacher-every 0",
}


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [
        line.split("#")[0].strip() for b in blocks for line in b.splitlines() if line.startswith(("python", "torchrun"))
    ]


def run(command, folder):
    start, words = [sys.executable], command.split()[1:]
    if command.startswith("torchrun"):
        start += ["-m", "torch.distributed.run", "--standalone", *words[:2]]
        words = words[2:]
    script, *flags = words
    more = FEWER[script].split() if not {"--resume", "--help", "--dry-run"} & set(flags) else []
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    argv = [*start, str(ROOT / script), *flags, *more]
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_the_readmes_commands_run_in_the_order_in_which_they_stand(tmp_path):
    """Commands that share a folder one after the other, the others beside them."""
    shared = [c for c in commands() if "runs/mine" in c or "study.py" in c]
    assert len(shared) >= 3 and len(commands()) >= 9
    with ThreadPoolExecutor(2) as pool:
        chain = pool.submit(lambda: [run(c, tmp_path) for c in shared])
        for done in [pool.submit(run, c, tmp_path) for c in commands() if c not in shared] + [chain]:
            done.result()


def test_no_placeholder_is_left_and_every_link_leads_somewhere():
    assert not re.findall(r"@[A-Z_]+@", README)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(("name", "lines"), re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README))
def test_line_counts_are_about_right(name, lines):
    actual = (ROOT / name).read_text().count("\n")
    assert abs(actual - int(lines)) <= max(5, 0.1 * actual), f"{name} has {actual} lines, the README says {lines}"


def test_every_file_is_in_the_reading_order_and_every_named_thing_exists():
    assert {p.name for p in ROOT.glob("*.py")} == set(re.findall(r"\| `(\w+\.py)` \| \d+ \|", README))
    for module, name in re.findall(r"`(losses|agreement|ema|unisd|reading)\.(\w+)", README):
        assert re.search(rf"\b{name}\b", (ROOT / f"{module}.py").read_text()), f"{module}.{name}"
    for flag in set(re.findall(r"`(--[a-z-]+)", README)):
        field = flag[2:].removeprefix("no-").replace("-", "_")
        assert any(
            field in (ROOT / f).read_text() for f in ("config.py", "unisd.py", "eval.py", "study.py", "tiny.py")
        ), flag


def test_the_lines_of_ones_own_data_are_good_ones(tmp_path):
    (lines,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my.jsonl").write_text(lines)
    task, manifest = load_jsonl(tmp_path / "my.jsonl", test_share=0.34)
    assert not manifest["bad_lines"] and len(task.train) + len(task.test) == 3
    whole = [*task.train, *task.test]
    assert all(r["correct"] for r in task.score(whole, [e.reference for e in whole]))


def test_the_rows_of_the_results_are_those_of_the_study():
    cells = lambda line: [c.strip() for c in line.strip().strip("|").split("|")]
    clean = (ROOT / "results" / "table.md").read_text().split("\n### ")[1]
    head, _, *rows = [cells(line) for line in clean.splitlines() if line.startswith("|")]
    kept = [i for i, name in enumerate(head) if name not in ("gain", "step time / SFT")]
    measured = {row[0]: [row[i] for i in kept] for row in rows}
    section = README.split("## What we measured")[1].split("\n## ")[0]
    shown = [cells(line) for line in section.splitlines() if line.startswith("|") and line.count("|") == len(kept) + 1]
    shown = [row for row in shown if row[0] in measured]
    assert len(shown) >= 20 and all(row == measured[row[0]] for row in shown)
