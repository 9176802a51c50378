"""study.py - the paper's table in miniature: recipes x seeds x settings on the tiny world, by one command that resumes.

    python -m experiments.study --quick                      a first look: 4 recipes, 2 seeds; estimated 8 minutes on 2 cores
    python -m experiments.study                              the full study: 5 seeds; estimated just under 3 hours
    python -m experiments.study --world real                 SmolLM2-135M, hours on a CPU; or regimes: docs/when-it-helps.md
    python -m experiments.study --recipes budget-10 budget-50 --settings clean wrong       further rows join the same table

The idea: a cell of the table is one ordinary `python train.py` in a process of its own, with one thread, at most one per core.
After every cell <out>/cells.json (the numbers of every run) and <out>/table.md (their means) are written; at the end report.py
adds figures and the page of claims. Stop it at any moment: the same command goes on. Whatever is finished is in the table.
Depends on the three .toml beside it, config.py; train.py, report.py as commands.   Try it:  python -m pytest tests/test_study.py -q
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from engine.checkpoint import command, writable
from engine.config import RECIPES

ROOT = Path(__file__).parents[1]
WORLDS = {w: tomllib.loads((ROOT / f"experiments/{w}.toml").read_text(encoding="utf-8")) for w in ("tiny", "real", "regimes")}
PLAN = WORLDS["tiny"]
WORLD_OF = {setting: world for world, plan in WORLDS.items() for setting in plan["settings"]}
SETTINGS = {name: WORLDS[world]["settings"][name].split() for name, world in WORLD_OF.items()}
ROWS = {recipe: ["--recipe", recipe] for recipe in RECIPES if recipe != "privileged"}
ROWS |= {name: flags.split() for plan in WORLDS.values() for name, flags in plan["rows"].items()}
FULL = {name: WORLDS[world]["full"][name].split() for name, world in WORLD_OF.items()}
QUICK, QUICK_SEEDS = PLAN["quick"]["rows"].split(), PLAN["quick"]["seeds"]
# Two-sided 95 % quantiles of Student's t for 1 ... 9 degrees of freedom. With few seeds the normal 1.96 would be far too sure.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Cell(NamedTuple):
    """One run: a row of ROWS under one of SETTINGS with a seed. It is expected to take so many seconds of one core."""

    setting: str
    row: str
    seed: int

    def expected(self) -> int:
        return next(seconds for name, seconds in WORLDS[WORLD_OF[self.setting]]["seconds"].items() if name in self.row)


# --- running
def run(cell: Cell, out: Path, extra: list[str]) -> str:
    """One training run; goes on where an interrupted one stopped. -> "" or why it failed, also in failed.txt there."""
    folder = out / "runs" / cell.setting / f"{cell.row}-seed{cell.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if (folder / "settings.json").exists() else []
    quiet, own = ["--sample-every", "0", "--teacher-every", "60"], ["--seed", str(cell.seed), "--out", str(folder)]
    command = [sys.executable, "train.py", *quiet, *SETTINGS[cell.setting], *extra, *ROWS[cell.row], *own, *resume]  # later wins
    (folder / "failed.txt").unlink(missing_ok=True)  # train.py wants a folder without files of others
    with (folder / ".said").open("w") as said:  # a file, no pipe: whoever kills the study does not end its runs
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=said, stderr=said, check=False)
    if done.returncode in (0, 130):  # 130: stopped by hand
        return ""
    reason = ((folder / ".said").read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
    (folder / "failed.txt").write_text(reason + "\n", encoding="utf-8")
    return reason


def run_all(cells: list[Cell], out: Path, jobs: int, extra: list[str]) -> list[Cell]:
    """Run what is missing; the table is written after every cell. -> the cells that failed."""
    found, failed = read(out), []
    missing = [cell for cell in cells if cell.seed not in found.get(cell.setting, {}).get(cell.row, {})]
    total = sum(cell.expected() for cell in missing)
    print(f"{len(cells)} runs, {len(missing)} to do, {jobs} at a time: about {total / jobs / 60:.0f} minutes on an idle machine")
    # The bar counts expected seconds, so its estimate learns from this machine; smoothing 0: from all runs so far.
    look = dict(smoothing=0, bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left")
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=total, **look) as bar:
        futures = {pool.submit(run, cell, out, extra): cell for cell in missing}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                cell = futures[future]
                if reason := future.result():
                    failed.append(cell)
                    bar.write(f"{cell.setting}/{cell.row}, seed {cell.seed}: {reason}")
                bar.set_description(f"{done}/{len(missing)} runs")
                bar.update(cell.expected())
                write(read(out), out)
        finally:  # after Ctrl-C: what is running stops by itself or finishes; nothing new is started
            pool.shutdown(cancel_futures=True)
    return failed


# --- reading: runs -> numbers
def further(out: Path) -> str:
    """The --train flags under which the runs in `out` were made."""
    return (out / "flags.txt").read_text(encoding="utf-8").strip() if (out / "flags.txt").exists() else ""


def read(out: Path) -> dict:
    """Every finished run in <out>/cells.json or <out>/runs, whoever asked for it. -> {setting: {row: {seed: numbers}}}

    Added to the numbers: worst_family, the change of the family that does worst against the `sd` run of the same seed, and
    step_of_sft, the step time relative to the median of the `sft` runs of the same day (days and machines differ by far more).
    """
    kept, found = out / "cells.json", {}
    runs = json.loads(kept.read_text(encoding="utf-8").replace(": null", ": NaN")) if kept.exists() else []
    for path in out.glob("runs/*/*-seed*/summary.json"):
        row, seed = path.parent.name.rsplit("-seed", 1)
        if seed.isdigit():
            cell = Cell(path.parents[1].name, row, int(seed))
            runs.append(cell._asdict() | numbers(path, path.stat().st_mtime_ns))
    place = lambda name, known: (list(known).index(name) if name in known else len(known), name)
    for run in sorted(runs, key=lambda run: (place(run["setting"], SETTINGS), place(run["row"], ROWS), run["seed"])):
        found.setdefault(run["setting"], {}).setdefault(run["row"], {})[run["seed"]] = run  # <out>/runs wins: it came last
    for rows in found.values():
        for run in (run for row in rows.values() for run in row.values()):
            sft = [other["step_seconds"] for other in rows.get("sft", {}).values() if other.get("day") == run.get("day")]
            run["step_of_sft"] = run["step_seconds"] / statistics.median(sft) if sft else math.nan
            if plain := rows.get("sd", {}).get(run["seed"]):
                run["worst_family"] = min(v - plain["by_task"].get(f, math.nan) for f, v in run["by_task"].items())
    return found


@cache  # with the time stamp: the study asks again after every run
def numbers(path: Path, stamp: int) -> dict:
    """One finished run: its summary, and what its log adds (times, gradient norms, curves)."""
    summary, log = json.loads(path.read_text()), path.with_name("log.jsonl")
    steps = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    seconds = [sum(value for key, value in step.items() if key.startswith("s_")) for step in steps]
    norms = sorted(step["grad_norm"] for step in steps[len(steps) // 10 :]) or [math.nan]  # without the warm-up
    curve = lambda key: [(step["step"], step[key]) for step in steps if step.get(key) is not None]
    curves = {key: curve(key) for key in ("student_accuracy", "teacher_accuracy", "div")}
    twenties = [curves["div"][i : i + 20] for i in range(0, len(curves["div"]), 20)]  # one step is noisy
    curves["div"] = [(part[-1][0], statistics.mean(value for _, value in part)) for part in twenties]
    before, after = summary["before"]["accuracy"], summary["after"]
    found = {"accuracy": after["accuracy"], "gain": after["accuracy"] - before}
    found |= {"ood": summary["ood"]["after"].get("accuracy", math.nan), "jsd": after["jsd_to_base"]}
    found |= {key: after[key] for key in ("retention_ppl", "reverse_ppl")}
    found |= {"step_seconds": statistics.median(seconds) if seconds else math.nan}
    found |= {"day": time.strftime("%Y-%m-%d", time.localtime(stamp / 1e9)), "grad_norm_95": norms[int(0.95 * (len(norms) - 1))]}
    found |= {"before": before, "ceiling": summary["ceiling"]["accuracy"], "by_task": after["by_task"]}
    found |= {f"ood_{side}": summary["ood"].get(side, {}).get("accuracy", math.nan) for side in ("before", "ceiling")}
    return found | {"steps": summary["steps"], "curves": curves}


def spread(values, least: int = 2) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t over the seeds); nan with fewer than `least` seeds."""
    values = [value for value in values if value == value]  # a recipe of 0 steps has no time per step: nan
    n = len(values)
    if n < least:
        return (statistics.mean(values) if values else math.nan), math.nan
    return statistics.mean(values), STUDENT_T[min(n - 2, 8)] * statistics.stdev(values) / math.sqrt(n)


def median_and_range(values) -> tuple[float, float, float]:
    """Median, lowest, highest; nan without a value. For what one seed can multiply: a perplexity, a time on a shared machine."""
    values = [value for value in values if value == value] or [math.nan]
    return statistics.median(values), min(values), max(values)


# --- writing: numbers -> the table
COLUMNS = ["recipe", "accuracy", "gain", "OOD", "JSD to base", "retention PPL", "step time / SFT"]


def table_row(name: str, runs: list[dict], families: list[str]) -> str:
    """One row of ROWS under one setting: COLUMNS, families, the number of seeds."""
    values = lambda key: [run[key] for run in runs]
    interval = lambda key, decimals: "{:,.{d}f} ± {:,.{d}f}".format(*spread(values(key)), d=decimals)
    ppl, half = spread(values("retention_ppl"))
    drift = interval("retention_ppl", 2 if ppl < 100 else 0)
    if half > ppl:  # orders of magnitude between seeds: mean ± half would reach below 0
        drift = "{:,.0f} [{:,.0f}, {:,.0f}]".format(*median_and_range(values("retention_ppl")))
    entries = [interval("accuracy", 1), f"{spread(values('gain'))[0]:+.1f}", interval("ood", 1), interval("jsd", 4), drift]
    entries += [f"{median_and_range(values('step_of_sft'))[0]:.1f}"]
    entries += [f"{spread(run['by_task'].get(family, math.nan) for run in runs)[0]:.0f}" for family in families]
    return f"| {name} | {' | '.join(entries).replace(' ± nan', '').replace('nan', '–')} | {len(runs)} |"


def markdown(found: dict, out: Path) -> str:
    """The table as the README shows it, one for each setting; below it what failed and has not succeeded since."""
    lines = [WORLDS[world]["page"]["table"] for world in dict.fromkeys(WORLD_OF.get(s, "tiny") for s in found)]
    lines += [f"**With `--train {further(out)}`.**\n"] if further(out) else []
    for setting in dict.fromkeys([*found, *sorted(path.name for path in out.glob("runs/*"))]):
        rows = {name: list(runs.values()) for name, runs in found.get(setting, {}).items()}
        failed = [p for p in sorted(out.glob(f"runs/{setting}/*/failed.txt")) if not p.with_name("summary.json").exists()]
        if not rows and not failed:
            continue
        lines += [f"### {setting}: `{' '.join(SETTINGS.get(setting, ())) or 'no extra flags'}`", ""]
        runs = [run for runs in rows.values() for run in runs]
        lengths = sorted({run["steps"] for run in runs} - {0})
        lines += [f"**Runs of different length ({lengths} steps) are mixed here.**", ""] if len(lengths) > 1 else []
        if rows:
            head = [*COLUMNS, *dict.fromkeys(family for run in runs for family in run["by_task"]), "seeds"]
            lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            lines += [*(table_row(name, runs, head[len(COLUMNS) : -1]) for name, runs in rows.items()), ""]
        lines += [f"- failed: {path.parent.name}: {path.read_text(encoding='utf-8').strip()}" for path in failed]
        lines += [""] if failed else []
    return "\n".join(lines)


def write(found: dict, out: Path) -> str:
    """<out>/table.md and cells.json, each replaced in one go. -> the former."""
    out.mkdir(parents=True, exist_ok=True)
    table = markdown(found, out)
    cells = ",\n".join(json.dumps(run) for rows in found.values() for runs in rows.values() for run in runs.values())
    for name, content in (("table.md", table), ("cells.json", f"[\n{cells}\n]".replace(": NaN", ": null"))):
        (out / f"{name}.new").write_text(content + "\n", encoding="utf-8")
        (out / f"{name}.new").replace(out / name)
    return table


@command("study.py", stopped="stopped; the same command goes on")
def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then write table, figures and claims; stopped, it goes on. Without flags: 5 seeds, nearly 3 hours on 2
    cores; what that leaves out (further budgets, K, gamma, star-clip) can be asked for by --recipes and joins the same table."""
    parser = argparse.ArgumentParser(prog="study.py", description=main.__doc__)
    add, quick = parser.add_argument, f"{', '.join(QUICK)} in clean, {QUICK_SEEDS} seeds: estimated 8 minutes on 2 cores"
    rows = f"rows of the table (default: those of the full study): {', '.join(ROWS)}"
    add("--recipes", nargs="+", choices=ROWS, metavar="ROW", help=rows)
    worlds = "tiny; real: SmolLM2-135M on sums and function calls; regimes: a tiny world for each mechanism (default: %(default)s)"
    add("--world", choices=WORLDS, default="tiny", help=worlds)
    add("--settings", nargs="+", choices=SETTINGS, help="what the data are like (default: all; with --recipes: the world's first)")
    add("--seeds", type=int, help="seeds 0 ... N-1 (default: 5 in the tiny world and the regimes, 3 in the real one)")
    add("--out", help="where table, figures and runs go (default: runs/study, of another world runs/study-WORLD)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each (default: %(default)s)")
    add("--quick", action="store_true", help=quick)
    add("--train", nargs=argparse.REMAINDER, default=[], help="further flags for train.py, last on the line")
    args = parser.parse_args(argv)
    if args.quick:
        args.recipes, args.seeds = QUICK, QUICK_SEEDS
    plan = WORLDS[args.world]
    settings = args.settings or list(plan["settings"])[: 1 if args.recipes else None]
    seeds = range(args.seeds if args.seeds is not None else plan["page"]["seeds"])
    # Seeds first, so that a study stopped early has whole columns of few seeds rather than few recipes of many.
    cells = [Cell(s, row, seed) for seed in seeds for s in settings for row in args.recipes or FULL[s]]
    begun = time.perf_counter()
    out = writable(args.out or plan["page"]["out"]).resolve()  # absolute: the runs are started in this repository's folder
    given = " ".join(args.train)
    if given != further(out) and ((out / "runs").exists() or (out / "cells.json").exists()):
        raise ValueError(f"--out {out} holds runs with --train {further(out) or 'none'}: give the same, or choose another folder")
    if (out / "table.md").exists() and not (out / "cells.json").exists():
        raise ValueError(f"--out {out} holds a table.md, which is of no study: choose another folder")
    (out / "flags.txt").write_text(given + "\n", encoding="utf-8")
    failed = run_all(cells, out, max(1, args.jobs), args.train)
    found = read(out)
    print(f"\n{write(found, out)}\n{len(cells)} runs, {time.perf_counter() - begun:.0f} s -> {out / 'table.md'}", flush=True)
    if found and args.world == "tiny":
        subprocess.run([sys.executable, "-m", "experiments.report", str(out)], cwd=ROOT, check=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
