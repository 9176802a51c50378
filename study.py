"""study.py - the paper's table in miniature: recipes x seeds x settings on the tiny world, one command, resumable.

    python study.py --quick                      a first look: 5 recipes, 2 seeds
    python study.py                              every recipe, 3 seeds, clean references
    python study.py --settings clean wrong       also with 35 % wrong references

Every cell of the table is one ordinary `python train.py` run in a process of its own, with one thread, at most one per
core. A cell is done when its summary.json is there, so the study can be stopped at any moment and started again with
the same command. Results are written after every cell: <out>/table.md, <out>/table.json. Nothing is chosen by looking
at the result: every run that was asked for is in the table, failures too.

Depends on config.py; train.py as a command.   Try it:  python -m pytest tests/test_study.py -q
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
from pathlib import Path

from tqdm import tqdm

from config import RECIPES

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
QUICK = ["sft", "ssd", "sd", "ema", "unisd-star"]
# Two-sided 95 % quantiles of Student's t for 1 ... 9 degrees of freedom: with few seeds the normal 1.96 would be far
# too sure.
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Cell:
    setting: str
    recipe: str
    seed: int

    def folder(self, out: Path) -> Path:
        return out / "runs" / self.setting / f"{self.recipe}-seed{self.seed}"


def run(cell: Cell, out: Path, extra: list[str]) -> str:
    """One training run; goes on where an interrupted one stopped. -> "" or why it failed."""
    folder = cell.folder(out)
    if (folder / "summary.json").exists():
        return ""
    command = [sys.executable, "train.py", *ROWS[cell.recipe], "--seed", str(cell.seed), "--out", str(folder)]
    command += [*SETTINGS[cell.setting], "--sample-every", "0", "--teacher-every", "60", *extra]
    if (folder / "settings.json").exists():
        command.append("--resume")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def result(cell: Cell, out: Path) -> dict | None:
    """The numbers of one finished cell."""
    path = cell.folder(out) / "summary.json"
    if not path.exists():
        return None
    s = json.loads(path.read_text())
    rows = [json.loads(line) for line in path.with_name("log.jsonl").read_text().splitlines()]
    seconds = [sum(v for k, v in r.items() if k.startswith("s_")) for r in rows]
    return {
        "accuracy": s["after"]["accuracy"],
        "gain": s["after"]["accuracy"] - s["before"]["accuracy"],
        "ood": s["ood"]["after"].get("accuracy", math.nan),
        "jsd": s["after"]["jsd_to_base"],
        "retention_ppl": s["after"]["retention_ppl"],
        "reverse_ppl": s["after"]["reverse_ppl"],
        "step_seconds": statistics.median(seconds) if seconds else math.nan,
        "by_task": s["after"]["by_task"],
        "before": s["before"]["accuracy"],
        "ceiling": s["ceiling"]["accuracy"],
    }


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t over the seeds); nan with a single seed."""
    values = [v for v in values if v == v]  # a recipe of 0 steps has no time per step: nan
    n = len(values)
    if n < 2:
        return (values[0] if values else math.nan), math.nan
    return statistics.mean(values), STUDENT_T[min(n - 2, 8)] * statistics.stdev(values) / math.sqrt(n)


def summarise(cells: list[Cell], out: Path, failed: dict[Cell, str]) -> dict:
    """{setting: {recipe: {metric: (mean, half-width)}}} over the seeds that are done."""
    table: dict = {}
    for cell in cells:
        table.setdefault(cell.setting, {}).setdefault(cell.recipe, []).append(result(cell, out))
    for setting, recipes in table.items():
        for recipe, found in recipes.items():
            done = [r for r in found if r]
            metrics = (
                "accuracy",
                "gain",
                "ood",
                "jsd",
                "retention_ppl",
                "reverse_ppl",
                "step_seconds",
                "before",
                "ceiling",
            )
            row = {k: spread([r[k] for r in done]) for k in metrics}
            row["by_task"] = {
                f: spread([r["by_task"][f] for r in done])[0] for f in (done[0]["by_task"] if done else ())
            }
            row["seeds"] = len(done)
            row["failed"] = [why for c, why in failed.items() if (c.setting, c.recipe) == (setting, recipe)]
            recipes[recipe] = row
    return table


def markdown(table: dict) -> str:
    """The table as the README shows it: mean ± half a 95 % interval over seeds."""
    lines = []
    for setting, recipes in table.items():
        families = list(next((r["by_task"] for r in recipes.values() if r["by_task"]), {}))
        sft = recipes.get("sft", {}).get("step_seconds", (math.nan,))[0]
        lines += [f"### {setting}: `{' '.join(SETTINGS[setting]) or 'no extra flags'}`", ""]
        lines.append(
            "| recipe | accuracy | OOD | JSD to base | retention PPL | step time / SFT | "
            + " | ".join(families)
            + " | seeds |"
        )
        lines.append("|---" * (7 + len(families)) + "|")
        for recipe, r in recipes.items():
            pm = lambda k, d, r=r: f"{r[k][0]:.{d}f}" + (f" ± {r[k][1]:.{d}f}" if r[k][1] == r[k][1] else "")
            cost = (
                f"{r['step_seconds'][0] / sft:.1f}"
                if sft == sft and r["step_seconds"][0] == r["step_seconds"][0]
                else "–"
            )
            cells = [pm("accuracy", 1), pm("ood", 1), pm("jsd", 4), pm("retention_ppl", 2), cost]
            cells += [f"{r['by_task'].get(f, math.nan):.0f}" for f in families]
            lines.append(
                f"| {recipe} | "
                + " | ".join(cells)
                + f" | {r['seeds']}{' (failed: ' + r['failed'][0] + ')' if r['failed'] else ''} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(
        prog="study.py", description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", choices=ROWS, default=list(ROWS), help="rows of the table")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["clean"], help="what the world is like")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 ... N-1")
    parser.add_argument("--out", default="results", help="where the table and the runs go")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, two seeds")
    parser.add_argument(
        "--train", nargs=argparse.REMAINDER, default=[], help="further flags for train.py, last on the line"
    )
    args = parser.parse_args(argv)
    if args.quick:
        args.recipes, args.seeds = QUICK, 2
    out, failed = Path(args.out).resolve(), {}  # absolute: the runs have this folder as their own
    # Seeds first, so that a study stopped early has whole columns of few seeds rather than few recipes of many.
    cells = [Cell(s, r, seed) for seed in range(args.seeds) for s in args.settings for r in args.recipes]
    todo = [c for c in cells if result(c, out) is None]
    begun = time.perf_counter()
    with (
        ThreadPoolExecutor(max(1, args.jobs)) as pool,
        tqdm(total=len(cells), initial=len(cells) - len(todo), unit="run") as bar,
    ):
        futures = {pool.submit(run, c, out, args.train): c for c in todo}
        for future in as_completed(futures):
            cell = futures[future]
            if future.result():
                failed[cell] = future.result()
                bar.write(f"{cell.setting}/{cell.recipe}, seed {cell.seed}: {failed[cell]}")
            bar.update()
            write(summarise(cells, out, failed), out)
    text = write(summarise(cells, out, failed), out)
    print(f"\n{text}\n{len(cells)} runs, {time.perf_counter() - begun:.0f} s -> {out / 'table.md'}")
    return 1 if failed else 0


def write(table: dict, out: Path) -> str:
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(table)
    for name, content in (("table.md", text), ("table.json", json.dumps(table, indent=1).replace("NaN", "null"))):
        new = out / (name + ".new")
        new.write_text(content + "\n")
        os.replace(new, out / name)
    return text


if __name__ == "__main__":
    sys.exit(main())
