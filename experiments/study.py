"""study.py - the paper's table in miniature: recipes x seeds x settings on the tiny world, one command, resumable.

    python -m experiments.study --quick                      a first look: 4 recipes, 2 seeds; estimated 8 minutes on 2 cores
    python -m experiments.study                              the full study: 5 seeds; estimated just under 3 hours
    python -m experiments.study --recipes budget-10 budget-50 --settings clean wrong       further rows join the same table

Every cell of the table is one ordinary `python train.py` run in a process of its own, with one thread, at most one per
core. Results are written after every cell: <out>/cells.json, the numbers of every run, and <out>/table.md, their means;
at the end report.py adds figures and the page of claims. The study can be stopped at any moment: the same command goes
on, and what is in cells.json is not run again, even where <out>/runs is gone. Nothing is chosen by looking at the
result: whatever is finished is in the table, and what failed is named below it. This repository's own is in results/.

Depends on config.py; train.py and report.py as commands.   Try it:  python -m pytest tests/test_study.py -q
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tqdm import tqdm

from engine.config import RECIPES

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, list[str]] = {  # what the world is like -> flags of train.py
    "clean": [],
    "wrong": ["--wrong-references", "0.35"],
    "small": ["--train-size", "200"],
    "hot": ["--temperature", "1.5"],
}
STAR = ["--recipe", "unisd-star"]
ROWS: dict[str, list[str]] = {r: ["--recipe", r] for r in RECIPES if r != "privileged"} | {
    # UniSD* without one of its parts, and with one more
    "star-no-ema": [*STAR, "--teacher", "frozen"],
    "star-no-agreement": [*STAR, "--agreement", "none"],
    "star-no-contrast": [*STAR, "--w-contrast", "0"],
    "star-no-match": [*STAR, "--w-match", "0"],
    "star-clip": [*STAR, "--clip", "10"],
    # as the official code computes it: sequence weights cancel, the EMA teacher stays where it is
    "official-agree-seq": ["--recipe", "agree-seq", "--normalizer", "sequence"],
    "official-star": [*STAR, "--teacher", "frozen", "--normalizer", "sequence"],
    # contexts for the least certain share of the sequences only; 0 is star-no-agreement, 1 is unisd-star
    "budget-10": [*STAR, "--agreement-budget", "0.1"],
    "budget-25": [*STAR, "--agreement-budget", "0.25"],
    "budget-50": [*STAR, "--agreement-budget", "0.5"],
    "budget-25-divergence": [*STAR, "--agreement-budget", "0.25", "--uncertainty", "divergence"],
    "budget-25-random": [*STAR, "--agreement-budget", "0.25", "--uncertainty", "random"],
    # how many contexts, how strong
    "agree-token-k2": ["--recipe", "agree-token", "--contexts", "2"],
    "agree-token-k5": ["--recipe", "agree-token", "--contexts", "5"],
    "agree-token-gamma0.1": ["--recipe", "agree-token", "--gamma", "0.1"],
    "agree-token-gamma10": ["--recipe", "agree-token", "--gamma", "10"],
}
QUICK, QUICK_SEEDS = ["sft", "ssd", "sd", "unisd-star"], 2
ABLATION = ["star-no-ema", "star-no-agreement", "star-no-contrast", "star-no-match"]
BUDGET = ["budget-25", "budget-25-random"]
FULL: dict[str, list[str]] = {  # the full study: what fits into 3 hours on 2 cores with 5 seeds
    "clean": [*(r for r in RECIPES if r != "privileged"), *ABLATION, "official-agree-seq", "official-star", *BUDGET],
    "wrong": ["sft", "sd", "unisd-star", "star-no-agreement", *BUDGET],
    "small": ["sft", "sd"],
    "hot": ["sft", "sd"],
}
# About how long a run takes, seconds of one core (AMD EPYC); the others: see expected().
SECONDS = {"raw": 10, "sft": 60, "sft-worked": 60, "ssd": 90, "star-no-agreement": 125}
# Two-sided 95 % quantiles of Student's t for 1 ... 9 degrees of freedom: with few seeds the normal 1.96 would be far
# too sure.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Cell:
    """One run: a row of ROWS in a world of SETTINGS with a seed."""

    setting: str
    row: str
    seed: int

    def folder(self, out: Path) -> Path:
        return out / "runs" / self.setting / f"{self.row}-seed{self.seed}"

    def expected(self) -> int:
        """Seconds of one core that the run takes, roughly: contexts are what is expensive."""
        if self.row in SECONDS:
            return SECONDS[self.row]
        return 150 if "budget" in self.row else 190 if "star" in self.row or "agree" in self.row else 110


# --- running


def run(cell: Cell, out: Path, extra: list[str]) -> str:
    """One training run; goes on where an interrupted one stopped. -> "" or why it failed, also in failed.txt there."""
    folder = cell.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train.py", *ROWS[cell.row], "--seed", str(cell.seed), "--out", str(folder)]
    command += [*SETTINGS[cell.setting], "--sample-every", "0", "--teacher-every", "60", *extra]
    if (folder / "settings.json").exists():
        command.append("--resume")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    why = "" if done.returncode in (0, 130) else (done.stderr.strip().splitlines() or ["no message"])[-1]
    if why:  # 130: stopped by hand
        (folder / "failed.txt").write_text(why + "\n")
    else:
        (folder / "failed.txt").unlink(missing_ok=True)
    return why


def clock(seconds: float) -> str:
    """90 -> "2 min", 7300 -> "2 h 02 min"."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def run_all(cells: list[Cell], out: Path, jobs: int, extra: list[str]) -> list[Cell]:
    """Run what is missing; the table is written after every cell. -> the cells that failed."""
    found, failed, finished = read(out), [], 0
    todo = [c for c in cells if c.seed not in found.get(c.setting, {}).get(c.row, {})]
    total, begun = sum(c.expected() for c in todo), time.perf_counter()
    print(f"{len(cells)} runs, {len(todo)} to do, {jobs} at a time: about {clock(total / jobs)} on an idle machine")
    look = dict(total=len(cells), bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} runs, {elapsed}{postfix}")
    with ThreadPoolExecutor(jobs) as pool, tqdm(initial=len(cells) - len(todo), **look) as bar:
        futures = {pool.submit(run, c, out, extra): c for c in todo}
        bar.set_postfix_str(f"about {clock(total / jobs)} left")
        try:
            for future in as_completed(futures):
                cell = futures[future]
                if future.result():
                    failed.append(cell)
                    bar.write(f"{cell.setting}/{cell.row}, seed {cell.seed}: {future.result()}")
                # The estimate learns from this machine: seconds used per second expected, so far.
                finished += cell.expected()
                pace = (time.perf_counter() - begun) * jobs / finished
                bar.set_postfix_str(f"about {clock((total - finished) / jobs * pace)} left")
                bar.update()
                write(read(out), out)
        except KeyboardInterrupt:  # what runs now stops by itself or finishes; nothing further is begun
            pool.shutdown(cancel_futures=True)
            raise
    return failed


# --- reading: runs -> numbers


def read(out: Path) -> dict:
    """Every finished run in <out>/cells.json or <out>/runs, whoever asked for it. -> {setting: {row: {seed: numbers}}}

    Added to the numbers: worst_family, the change of the family that does worst against the `sd` run of the same seed, and
    step_of_sft, the step time relative to the median of the `sft` runs of the same day (days and machines differ by far more).
    """
    found, kept = {}, out / "cells.json"
    for cell in json.loads(kept.read_text()) if kept.exists() else ():
        cell = {k: math.nan if v is None else v for k, v in cell.items()}
        found.setdefault(cell.pop("setting"), {}).setdefault(cell.pop("row"), {})[cell.pop("seed")] = cell
    for path in out.glob("runs/*/*-seed*/summary.json"):
        row, seed = path.parent.name.rsplit("-seed", 1)
        if seed.isdigit():
            rows = found.setdefault(path.parents[1].name, {})
            rows.setdefault(row, {})[int(seed)] = numbers(path, path.stat().st_mtime_ns)
    for rows in found.values():
        plain = {seed: cell["by_task"] for seed, cell in rows.get("sd", {}).items()}
        sft = [(cell.get("day"), cell["step_seconds"]) for cell in rows.get("sft", {}).values()]
        for cells, seed in ((c, k) for c in rows.values() for k in c):
            day = [t for d, t in sft if d == cells[seed].get("day")]
            added = {"step_of_sft": cells[seed]["step_seconds"] / statistics.median(day) if day else math.nan}
            if seed in plain:
                worst = min(v - plain[seed].get(f, math.nan) for f, v in cells[seed]["by_task"].items())
                added["worst_family"] = worst
            cells[seed] = cells[seed] | added
    place = lambda known: lambda name: (known.index(name) if name in known else len(known), name)
    settings, order = place(list(SETTINGS)), place(list(ROWS))
    return {s: {r: found[s][r] for r in sorted(found[s], key=order)} for s in sorted(found, key=settings)}


@cache  # with the time stamp: the study asks again after every run
def numbers(path: Path, stamp: int) -> dict:
    """One finished run: its summary, and what its log adds (times, gradient norms, curves)."""
    s, log = json.loads(path.read_text()), path.with_name("log.jsonl")
    steps = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    seconds = statistics.median(sum(v for k, v in r.items() if k[:2] == "s_") for r in steps) if steps else math.nan
    norms = sorted(r["grad_norm"] for r in steps[len(steps) // 10 :]) or [math.nan]  # without the warm-up
    curves = {
        k: [(r["step"], r[k]) for r in steps if r.get(k) is not None] for k in ("student_accuracy", "teacher_accuracy", "div")
    }
    twenty = [curves["div"][i : i + 20] for i in range(0, len(curves["div"]), 20)]  # a step is noisy
    curves["div"] = [(part[-1][0], statistics.mean(v for _, v in part)) for part in twenty]
    return {
        "accuracy": s["after"]["accuracy"],
        "gain": s["after"]["accuracy"] - s["before"]["accuracy"],
        "ood": s["ood"]["after"].get("accuracy", math.nan),
        "jsd": s["after"]["jsd_to_base"],
        "retention_ppl": s["after"]["retention_ppl"],
        "reverse_ppl": s["after"]["reverse_ppl"],
        "step_seconds": seconds,
        "day": time.strftime("%Y-%m-%d", time.localtime(stamp / 1e9)),
        "grad_norm_95": norms[int(0.95 * (len(norms) - 1))],
        "before": s["before"]["accuracy"],
        "ceiling": s["ceiling"]["accuracy"],
        "by_task": s["after"]["by_task"],
        "steps": s["steps"],
        "curves": curves,
    }


def spread(values) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t over the seeds); nan with a single seed."""
    values = [v for v in values if v == v]  # a recipe of 0 steps has no time per step: nan
    n = len(values)
    if n < 2:
        return (values[0] if values else math.nan), math.nan
    return statistics.mean(values), STUDENT_T[min(n - 2, 8)] * statistics.stdev(values) / math.sqrt(n)


def times_sft(rows: dict, row: str) -> tuple[float, float, float]:
    """Step time relative to sft of the same day: median over the seeds, lowest, highest; nan without one. Medians, since a
    run beside other work may take twice its time.
    """
    times = [v for c in rows.get(row, {}).values() if (v := c["step_of_sft"]) == v] or [math.nan]
    return statistics.median(times), min(times), max(times)


# --- writing: numbers -> the table


def summarise(found: dict) -> dict:
    """{setting: {row: {metric: (mean, half-width)}}} over the seeds that are done."""
    plain = "accuracy gain ood jsd retention_ppl reverse_ppl step_seconds before ceiling".split()
    table: dict = {}
    for setting, rows in found.items():
        for row, cells in rows.items():
            done = list(cells.values())
            mean = {k: spread(c[k] for c in done) for k in plain}
            families = {f: spread(c["by_task"][f] for c in done)[0] for f in done[0]["by_task"]}
            more = {"by_task": families, "step_time_of_sft": times_sft(rows, row), "seeds": len(done)}
            table.setdefault(setting, {})[row] = mean | more | {"steps": sorted({c["steps"] for c in done})}
    return table


def failures(out: Path, setting: str) -> list[str]:
    """What failed and has not succeeded since, with its last message."""
    bad = sorted(p for p in out.glob(f"runs/{setting}/*/failed.txt") if not p.with_name("summary.json").exists())
    return [f"- failed: {p.parent.name}: {p.read_text().strip()}" for p in bad]


def markdown(table: dict, out: Path) -> str:
    """The table as the README shows it: mean ± half a 95 % interval over seeds."""
    lines = [
        "Mean ± half of a 95 % interval over seeds (Student's t). Accuracy, gain over the base, OOD and families in per cent "
        "of held-out questions; JSD in nats per token; step time: median over seeds, divided by that of `sft`, while other "
        "runs of that day shared the machine (`bench.py` measures it alone).",
        "",
    ]
    pm = lambda v, d: f"{v[0]:,.{d}f}" + (f" ± {v[1]:,.{d}f}" if v[1] == v[1] else "")
    for setting in dict.fromkeys([*table, *sorted(p.name for p in out.glob("runs/*"))]):
        rows, failed = table.get(setting, {}), failures(out, setting)
        if not rows and not failed:
            continue
        steps = sorted({n for r in rows.values() for n in r["steps"] if n})
        lines += [f"### {setting}: `{' '.join(SETTINGS.get(setting, ())) or 'no extra flags'}`", ""]
        if len(steps) > 1:
            lines += [f"**Runs of different length ({steps} steps) are mixed here.**", ""]
        families = list(dict.fromkeys(f for r in rows.values() for f in r["by_task"]))
        plain = "recipe|accuracy|gain|OOD|JSD to base|retention PPL|step time / SFT".split("|")
        head = [*plain, *families, "seeds"]
        for i, (row, r) in enumerate(rows.items()):
            lines += [] if i else ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
            cost, ppl = r["step_time_of_sft"][0], r["retention_ppl"]
            cells = [row, pm(r["accuracy"], 1), f"{r['gain'][0]:+.1f}", pm(r["ood"], 1), pm(r["jsd"], 4)]
            cells += [pm(ppl, 2 if ppl[0] < 100 else 0), f"{cost:.1f}" if cost == cost else "–"]
            cells += [f"{r['by_task'][f]:.0f}" if f in r["by_task"] else "–" for f in families]
            lines.append("| " + " | ".join([*cells, str(r["seeds"])]) + " |")
        lines += ([""] if rows else []) + failed + ([""] if failed else [])
    return "\n".join(lines)


def write(found: dict, out: Path) -> str:
    """<out>/table.md and cells.json, each replaced in one go. -> the former."""
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(summarise(found), out)
    flat = ((s, r, k, cells[k]) for s, rows in found.items() for r, cells in rows.items() for k in sorted(cells))
    lines = ",\n".join(json.dumps({"setting": s, "row": r, "seed": k} | c) for s, r, k, c in flat).replace("NaN", "null")
    for name, content in (("table.md", text), ("cells.json", f"[\n{lines}\n]")):
        new = out / (name + ".new")
        new.write_text(content + "\n")
        os.replace(new, out / name)
    return text


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then write the table, the figures and the page of claims. Stop it whenever you like: the
    same command goes on. Without flags: the full study, 5 seeds, estimated just under 3 hours on 2 cores; what it leaves out
    (further budgets, K, gamma, star-clip) can be asked for by --recipes and joins the same table.
    """
    parser = argparse.ArgumentParser(prog="study.py", description=main.__doc__)
    rows = f"rows of the table (default: those of the full study): {', '.join(ROWS)}"
    parser.add_argument("--recipes", nargs="+", choices=ROWS, metavar="ROW", help=rows)
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, help="what the world is like (default: all; with --recipes: clean)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 ... N-1 (default: %(default)s)")
    parser.add_argument("--out", default="runs/study", help="where table, figures and runs go (default: %(default)s)")
    cores = os.cpu_count() or 1
    many = "runs at a time, one thread each (default: %(default)s)"
    parser.add_argument("--jobs", type=int, default=cores, help=many)
    parser.add_argument(
        "--quick", action="store_true", help=f"{', '.join(QUICK)} in clean, {QUICK_SEEDS} seeds: estimated 8 minutes on 2 cores"
    )
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="further flags for train.py, last on the line")
    args = parser.parse_args(argv)
    if args.quick:
        args.recipes, args.seeds = QUICK, QUICK_SEEDS
    settings = args.settings or (["clean"] if args.recipes else list(FULL))
    # Seeds first, so that a study stopped early has whole columns of few seeds rather than few recipes of many.
    cells = [Cell(s, r, k) for k in range(args.seeds) for s in settings for r in args.recipes or FULL[s]]
    out, begun = Path(args.out).resolve(), time.perf_counter()  # absolute: the runs have this folder as their own
    try:
        failed = run_all(cells, out, max(1, args.jobs), args.train)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        return 130
    found = read(out)
    seconds = time.perf_counter() - begun
    print(f"\n{write(found, out)}\n{len(cells)} runs, {seconds:.0f} s -> {out / 'table.md'}", flush=True)
    if found:
        subprocess.run([sys.executable, "-m", "experiments.report", str(out)], cwd=ROOT, check=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
