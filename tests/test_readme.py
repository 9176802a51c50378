"""What the README and the how-to pages say can be done is done here, with fewer steps; what the README says is true."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import in_process
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.config import Config
from experiments import peers
from experiments.study import spread
from tasks import world
from tasks.data import chat_ids
from tasks.jsonl import load_jsonl
from tasks.tiny import ASSET

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = {p.name: p.read_text() for p in (ROOT / "docs").glob("*.md")}
HOWTO = ("gpu.md", "several-gpus.md", "your-data.md", "run-folder.md", "results.md", "cost.md", "reading.md")
FEWER = {  # script or module -> flags that make it quick
    "train.py": "--steps 2 --batch 4 --micro-batch 4 --eval-size 1 --train-size 50 --teacher-every 0 --device cpu",
    "eval.py": "--size 1 --device cpu",
    "explain.py": "",
    "unisd.py": "",
    "tasks.tiny": "--steps 1 --out tiny-again",
    "experiments.bench": "--repeats 1 --tokens 64 --vocab 500 --device cpu",
    "experiments.study": "--recipes sd --seeds 1 --train --steps 1 --batch 2 --eval-size 1 --train-size 50 --teacher-every 0",
}
INSTALL = "pip install -r requirements.txt && "
QUICK = ("python unisd.py",)  # and all that name runs/mine


def commands(text):
    """Every command in a bash block, in order, without the installation before it and the comment after it."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    lines = [re.sub(r"\s+#.*", "", line).strip().removeprefix(INSTALL) for line in lines]
    return [line for line in lines if line.startswith(("python", "torchrun"))]


OURS = commands(README)
OTHERS = [c for text in (*(DOCS[page] for page in HOWTO), (ROOT / "tasks/README.md").read_text()) for c in commands(text)]


def split(command):
    """-> what comes between `python` and the script: torchrun's words, or none; the script, or -m and a module; its flags."""
    words, start = command.split()[1:], []
    if command.startswith("torchrun"):
        start, words = ["-m", "torch.distributed.run", "--standalone", *words[:2]], words[2:]
    n = 2 if words[0] == "-m" else 1
    flags = [flag.strip('"') for flag in words[n:]]
    more = FEWER[words[n - 1]].split() if not {"--resume", "--help", "--dry-run"} & set(flags) else []
    return start, words[:n], flags + more


def run(command, folder):
    start, what, flags = split(command)
    what = what if len(what) == 2 else [str(ROOT / what[0])]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, *start, *what, *flags]
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def run_here(command, folder):
    """The same without a new process, which takes seconds to import torch and transformers."""
    start, what, flags = split(command)
    assert not start and len(what) == 1
    code, out, err = in_process(folder, *what, *flags)
    assert code == 0, f"{command}\n{out[-2000:]}\n{err[-2000:]}"


def run_all(chosen, folder):
    """Commands that share a folder one after the other, the others beside them."""
    shared = [c for c in chosen if "runs/mine" in c or "experiments.study" in c]
    with ThreadPoolExecutor(2) as pool:
        chain = pool.submit(lambda: [run(c, folder) for c in shared])
        for done in [pool.submit(run, c, folder) for c in chosen if c not in shared] + [chain]:
            done.result()


def is_quick(command):
    return command in QUICK or "runs/mine" in command


@pytest.mark.parametrize("others", [run_here, pytest.param(run, marks=pytest.mark.slow)])
def test_the_readmes_quick_commands_run_in_the_order_in_which_they_stand(others, tmp_path):
    """The first by a Python of its own, the others by this one; in the slow tests each by its own."""
    quick = [c for c in OURS if is_quick(c)]
    assert set(QUICK) < set(quick) and len(quick) >= 4
    for number, command in enumerate(quick):
        (others if number else run)(command, tmp_path)
    assert (tmp_path / "runs/mine/summary.json").exists()


@pytest.mark.slow
def test_the_other_commands_of_the_readme_and_of_the_how_to_pages_run(tmp_path):
    rest = [c for c in OURS + OTHERS if not is_quick(c) and not c.startswith("python -m pytest")]
    assert len(rest) >= 12 and sum(c.startswith("torchrun") for c in rest) >= 2
    run_all(list(dict.fromkeys(rest)), tmp_path)


def test_two_commands_install_and_do_everything():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert [b.strip() for b in blocks if INSTALL in b] == [f"{INSTALL}python train.py", f"{INSTALL}python -m pytest"]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 12_288


def test_no_placeholder_is_left_and_every_link_leads_somewhere():
    assert not re.findall(r"@[A-Z_]+@", README)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_named_thing_exists():
    for module, name in re.findall(r"`(losses|agreement|ema|unisd)\.(\w+)", README):
        assert re.search(rf"\b{name}\b", (ROOT / f"{module}.py").read_text()), f"{module}.{name}"
    scripts = [ROOT / "eval.py", *(ROOT / "experiments").glob("*.py"), ROOT / "tasks/tiny.py", ROOT / "explain.py"]
    known = "".join(path.read_text() for path in scripts)
    settings = {f"--{f.name.replace('_', '-')}" for f in fields(Config)} | {"--nproc-per-node", "--nnodes"}
    for page, text in {"README.md": README, **{page: DOCS[page] for page in HOWTO}}.items():
        for flag in set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", text)) - {"--help", "--index-url", "--shutdown-timeout"}:
            field = f"--{flag[2:].removeprefix('no-')}"
            assert field in settings or f'"{flag}"' in known, f"{page}: {flag}"


def test_the_lines_of_ones_own_data_are_good_ones(tmp_path):
    (lines,) = re.findall(r"```json\n(.*?)```", DOCS["your-data.md"], re.DOTALL)
    (tmp_path / "my.jsonl").write_text(lines)
    task, manifest = load_jsonl(tmp_path / "my.jsonl", test_share=0.34)
    assert not manifest["bad_lines"] and len(task.train) + len(task.test) == 3
    whole = [*task.train, *task.test]
    assert all(r["correct"] for r in task.score(whole, [e.reference for e in whole]))


# --- what was measured -----------------------------------------------------------------------------------------------


def cells(line):
    return [c.strip() for c in line.strip().strip("|").split("|")]


def tables(text):
    """Every table of a page. -> lists of {column: cell}"""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE):
        head, _, *rows = [cells(line) for line in block.splitlines()]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def measured():
    """The clean rows of the study's table; a spread larger than its mean gives way to median and range, see docs/results.md."""
    clean = (ROOT / "experiments/results/table.md").read_text().split("\n### ")[1]
    (table,) = tables(clean)
    runs = json.loads((ROOT / "experiments/results/cells.json").read_text())
    for row in table:
        mean, _, half = row["retention PPL"].replace(",", "").partition(" ± ")
        if half and float(half) > float(mean):
            mine = [r["retention_ppl"] for r in runs if (r["setting"], r["row"]) == ("clean", row["recipe"])]
            low, *_, high = mine = sorted(mine)
            row["retention PPL"] = f"median {mine[len(mine) // 2]:,.0f} ({low:,.0f} to {high:,.0f})"
    return {row["recipe"]: row for row in table}


def test_the_rows_of_the_results_are_those_of_the_study():
    truth = measured()
    shown = [row for table in tables(DOCS["results.md"]) for row in table if row.get("recipe") in truth]
    shown = [row for row in shown if "OOD" in row]
    assert len(shown) >= 20
    for row in shown:
        assert set(truth["sd"]) - row.keys() == {"gain", "step time / SFT"}
        assert row == {name: truth[row["recipe"]][name] for name in row}, row["recipe"]
    assert not [r for r in truth if not r.startswith("budget") and r not in {row["recipe"] for row in shown}]


def test_what_is_said_of_questions_out_of_distribution():
    found: dict = {}
    for run in json.loads((ROOT / "experiments/results/cells.json").read_text()):
        if run["setting"] == "clean" and run["ood"] is not None:
            found.setdefault(run["row"], {})[run["seed"]] = run["ood"]
            assert f"{run['ood_before']:.1f}" == "35.7" and f"{run['ood_ceiling']:.1f}" == "85.7"
    assert all(len(seeds) == 5 for seeds in found.values()) and len(found) == 14
    (said,) = [part for part in DOCS["results.md"].split("\n- ") if part.startswith("**Out of distribution everybody")]
    for row in [row for row in found if row not in ("raw", "sd")]:
        mean, half = spread([found[row][seed] - found["sd"][seed] for seed in range(5)])
        assert f"({mean:+.1f} ± {half:.1f})".replace("-", "−") in said.replace("\n  ", " "), row


def test_the_shares_of_answers_with_contexts_are_those_of_the_study():
    """The second table of results.md by name: clean accuracies of UniSD* with a budget."""
    truth = measured()
    (table,) = [t for t in tables(DOCS["results.md"]) if "clean references" in t[0]]
    rows = ["star-no-agreement", "budget-10", "budget-25", "budget-25-divergence", "budget-25-random", "budget-50"]
    rows += ["unisd-star", "sd", "sft"]
    for name, row in zip(rows, table, strict=True):
        assert row["clean references"] == truth[name]["accuracy"], name


def test_the_readme_has_one_small_table_of_results_under_its_caveat():
    truth = measured()
    cost = {row["recipe"]: row["time / SFT"] for t in tables(DOCS["cost.md"]) for row in t if "time / SFT" in row}
    cost["budget-25"] = cost["unisd-star, budget 0.25"]
    (table,) = [t for t in tables(README) if "accuracy" in t[0]]
    assert 6 <= len(table) <= 8
    for row in table:
        study = {name: truth[row["recipe"]][name] for name in ("recipe", "accuracy", "OOD", "JSD to base")}
        assert row == study | {"time / SFT": cost.get(row["recipe"], "–")}, row["recipe"]
    section = README.split("## Results")[1].split("\n## ")[0]
    assert section.index("cannot confirm or refute") < section.index("| recipe |")
    assert "not corrected" in section or "nothing is\n> corrected" in section


def test_the_costs_are_those_of_the_bench():
    """Times beside SFT and their parts, and the loss beside its peers."""
    bench = json.loads((ROOT / "experiments/results/bench-cpu.json").read_text())
    steps = {row["recipe"]: row for row in bench["steps"]}
    shown = [row for t in tables(DOCS["cost.md"]) for row in t if "sampling" in row]
    assert {row["recipe"] for row in shown} == steps.keys()
    for row in shown:
        truth = steps[row["recipe"]]
        assert row["time / SFT"] == f"{truth['time / sft']:.1f}", row["recipe"]
        for part in ("sampling", "scoring", "update"):
            assert row[part] == f"{truth[part + ' %']} %", row["recipe"]
    busy = {row["recipe"]: " and ".join(f"{x:.1f}" for x in row["time / sft-worked"]) for row in bench["equal answers"]["rows"]}
    said = DOCS["cost.md"].split("With equal answers.")[1].split("\n- ")[0]
    assert all(f" {busy[name]}" in said for name in ("sd", "unisd-star", "unisd-star, budget 0.25"))
    on_cpu, on_gpu = [t for t in tables(DOCS["cost.md"]) if "ours" in t[0]]
    gpu = json.loads((ROOT / "experiments/results/gpu-h100.json").read_text())
    losses = lambda rows: {(row["loss"], row["who"]): f"{row['units']:.2f} / {row['time / plain']:.2f}" for row in rows}
    found, as_cpu = losses(gpu["loss"]), losses(gpu["loss, sizes of a CPU"])
    found |= {(loss, "as on a CPU"): as_cpu[loss, who] for loss, who in as_cpu if who == "ours"}
    for table, truth, columns in (
        (on_cpu, losses(bench["loss"]), ("ours", "plain", "liger", "trl")),
        (on_gpu, found, ("ours", "as on a CPU", "plain", "liger")),
    ):
        for row in table:
            name, *others = row.values()
            for who, shown in zip(columns, others, strict=True):
                assert shown == truth.get((name, who), "–"), (name, who)


def test_the_gpus_numbers_are_those_of_its_run():
    gpu = json.loads((ROOT / "experiments/results/gpu-h100.json").read_text())
    (table,) = [t for t in tables(DOCS["gpu.md"]) if "peak GiB" in t[0]]
    names = {"unisd-star, all contexts": "unisd-star", "unisd-star (budget .25)": "unisd-star, budget 0.25"}
    steps = {row["recipe"]: row for row in gpu["model"]}
    assert len(table) == len(steps) == 6
    for row in table:
        truth = steps[names.get(row["recipe"], row["recipe"])]
        assert row["seconds"] == f"{truth['ms'] / 1000:.{1 + (truth['ms'] < 1000)}f}" and row["peak GiB"] == str(truth["peak GiB"])
        for part in ("sampling", "scoring", "update"):
            assert row[part] == f"{truth[part + ' %']} %" or (row[part] == "–" and truth[part + " %"] == 0)
    (table,) = [t for t in tables(DOCS["cost.md"]) if "chunk, side, piece" in t[0]]
    entry = lambda row: f"{1000 * row['seconds']:.0f} / {row['MB']}"
    sizes = {str(row["sizes"]).strip("[]") + row["loss"]: entry(row) for row in gpu["sizes, bf16"]}
    known = {"256, 128, 8 (a CPU's)": "256, 128, 8", "all 1,024": "1024, 1024, 1024", "plain formula": "plain"}
    for name, *cells in (row.values() for row in table):
        cases = ("forward", "jsd", "forward, K = 3")
        assert cells == [sizes[known.get(name, name.strip("*")) + loss] for loss in cases], name
    job, said = gpu["default_job"]["fp32"], DOCS["gpu.md"]
    assert f"{job['before']} → {job['after']['accuracy']} (ceiling {job['ceiling']};" in said and gpu["resume"]["bit_for_bit"]
    assert f"({job['before']} → {job['after']['accuracy']})" in README
    calls = gpu["bfcl"]["sd"]
    assert f"{calls['before']:.1f} → {calls['after']['accuracy']:.1f} on held-out calls, ceiling {calls['ceiling']:.1f}" in said


def test_what_is_said_of_trl_is_what_was_measured():
    for name in ("runs", "time", "sums-runs", "sums-time"):
        rows = json.loads((ROOT / f"experiments/results/peers/{name}.json").read_text())["rows"]
        assert peers.table(rows, timed=name.endswith("time")) in DOCS["cost.md"]


def test_the_answers_before_training_are_the_models():
    """The transcript's questions are held out, its references theirs, its first answers the untouched model's, greedily."""
    (table,) = [t for t in tables(README) if "a teacher's reference" in t[0]]
    held_out = {e.question: e for e in world.load(4000, 100).test}
    tokenizer, model = AutoTokenizer.from_pretrained(ASSET), AutoModelForCausalLM.from_pretrained(ASSET).eval()
    verdicts = []
    for row in table:
        question, reference, before = (row[k].strip("`") for k in ("question", "a teacher's reference", "before"))
        after = row["after"].split("`")[1]
        assert held_out[question].reference == reference
        answer = model.generate(**tokenizer_input(tokenizer, question), max_new_tokens=40, do_sample=False)[0]
        said = tokenizer.decode(answer, skip_special_tokens=True).split("assistant\n")[-1].strip()
        assert said == before, question
        first, second = world.score([held_out[question]] * 2, [before, after])
        assert not first["correct"]
        verdicts.append(second["correct"])
        assert second["correct"] == ("wrong" not in row["after"]), question
    assert sum(verdicts) >= 5 and not all(verdicts)  # one that is still wrong is shown as well


def tokenizer_input(tokenizer, question):
    ids = tokenizer.pad({"input_ids": [chat_ids(tokenizer, question)]}, return_tensors="pt")
    return {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}


def test_the_transcript_of_the_real_model_is_that_of_the_published_run():
    """Its numbers are those of experiments/results/real; answers.jsonl of that run lies beside them."""
    folder = ROOT / "experiments" / "results" / "real"
    cells = json.loads((folder / "cells.json").read_text(encoding="utf-8"))
    run = {row["row"]: row for row in cells if row["seed"] == 0 and row["setting"] == "sums"}
    answers = said_by(folder, "sd")
    told = re.search(r"alone (\d+) of 100 right, with the reference (\d+); after 40 steps of `sd`\s+(\d+)\.", README)
    assert [int(x) for x in told.groups()] == [run["raw"]["accuracy"], run["raw"]["ceiling"], run["sd"]["accuracy"]]
    counted = [
        100 * sum(row[f"{part}_correct"] for row in answers) / len(answers) for part in ("before", "with_reference", "after")
    ]
    assert counted == [run["raw"]["accuracy"], run["raw"]["ceiling"], run["sd"]["accuracy"]]
    known = {row["question"].split("\n")[0]: row for row in answers}
    (table,) = [t for t in tables(README) if "before" in t[0] and "a teacher's reference" not in t[0]]
    for row in table:
        answer = known[f"What is {row['question'].strip('`')}?"]
        assert answer["before"] == row["before"].strip("`")
        assert answer["after"].split() == " ".join(re.findall(r"`(.+?)`", row["after"])).split()
    (rows,) = [t for t in tables(DOCS["results.md"]) if "gained, lost" in t[0]]
    for row in (row for row in rows if row["gained, lost"] != "–"):
        name = row["recipe"].split()[0]
        moved = [int(r["after_correct"]) - int(r["before_correct"]) for r in said_by(folder, name)]
        assert row["gained, lost"] == f"{moved.count(1)}, {moved.count(-1)}" and run[name]["accuracy"] == 15 + sum(moved)
        assert row["JSD to base"] == f"{run[name]['jsd']:.4f}" and row["retention PPL"] == f"{run[name]['retention_ppl']:.2f}"
    for row in rows:
        more = {
            cell["seed"]: cell["accuracy"] for cell in cells if (cell["setting"], cell["row"]) == ("sums", row["recipe"].split()[0])
        }
        shown = ", ".join(f"{more[seed]:.0f}" for seed in sorted(more) if seed) or "–"
        assert row["accuracy of further seeds"] == (shown if "with the reference" not in row["recipe"] else "–"), row["recipe"]
    habit = sum(r["after"].startswith("A correct solution is:") for r in said_by(folder, "ema-98"))
    assert f"{habit} of its 100 answers" in DOCS["results.md"]
    assert not any(r["after"].startswith("A correct") for r in said_by(folder, "sd"))
    calls, (cell,) = said_by(folder, "bfcl-sd"), [row for row in cells if row["setting"] == "bfcl"]
    calls = [row for row in calls if "with_reference" in row]  # the others are out of distribution
    opens = lambda part: sum(row[part].strip().startswith("A correct solution is:") for row in calls)
    habit = {part: opens(part) for part in ("with_reference", "after")}
    told = "after training {after}, with the reference {with_reference} of 100 answers"
    assert len(calls) == 100 and told.format(**habit) in DOCS["results.md"]
    right = [sum(row[f"{part}_correct"] for row in calls) for part in ("before", "after")]
    assert "of the 100 held-out ones {} → {} are right".format(*right) in DOCS["results.md"]
    assert f"{cell['before']:.1f} → {cell['accuracy']:.1f}, ceiling {cell['ceiling']:.1f}" in DOCS["results.md"]


def said_by(folder, name):
    return [json.loads(line) for line in (folder / f"answers-{name}-seed0.jsonl").read_text(encoding="utf-8").splitlines()]
