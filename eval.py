"""eval.py - one table for any checkpoint: accuracy with intervals, in and out of distribution, beside its base, and
what it forgot.

    python eval.py --model runs/mine                                     accuracy alone and with the reference
    python eval.py --model runs/mine --base tiny                         and drift, and paired differences
    python eval.py --model DIR --base Qwen2.5-0.5B --task all --out R    the paper's six benchmarks, as its Table 1

What: per task, accuracy of the model and of its base on the same questions, the paired difference with its 95 %
interval, the out-of-distribution task that belongs to it, gold-solution perplexity, drift, length, entropy and the
share that ended by itself. `--out` receives eval.json, eval.md, a figure, answers.jsonl (every question with its answers)
and a cache of the generated tokens, which are used again only for the very same weights, prompts and settings. A task that
cannot be loaded is named and left out; the others go on.

What each number means stands at the top of engine/metrics.py, which measures them.
Depends on engine/ and tasks/.   Try it:  python -m pytest tests/test_eval.py -q
"""

import argparse
import json
import os
import sys
import tempfile
from itertools import compress
from pathlib import Path

from engine import checkpoint, metrics
from engine.config import day, settings_behind
from engine.loading import Loaded, choose_device, load, load_base
from engine.watch import bars
from tasks.catalog import load_task
from tasks.data import Task

MEMORY = "the device is out of memory: lower --sample-batch or --max-new-tokens"
TABLE_1 = ("scienceqa", "cos_e", "mbpp", "toolalpaca")  # the paper's, whose first and third bring GPQA and HumanEval with them


def one_model(lm: Loaded, task: Task, limit: int, cache: Path) -> dict:
    """All that is measured of one model on one task."""
    found = {"alone": metrics.measure(lm, task, task.test, False, limit, cache)}
    found["with_reference"] = metrics.measure(lm, task, task.test, True, limit, cache)
    if task.ood:
        found["ood"] = metrics.measure(lm, task, task.ood, False, limit, cache)
        found["ood_with_reference"] = metrics.measure(lm, task, task.ood, True, limit, cache)
    prompts = metrics.prompts_for(lm, task, task.test, False, limit)
    found["entropy"] = metrics.mean_entropy(lm, prompts, *metrics.answers(lm, prompts, limit, cache))
    found["gold_ppl"] = metrics.gold_ppl(lm, task, task.test)
    return found


def evaluate(model: Loaded, base: Loaded | None, task: Task, limit: int, cache: Path) -> dict:
    """One task: the model, its base, and what lies between them. Raises ValueError if no question fits."""
    limit = limit or min(task.max_new_tokens, model.context // 2)
    for lm in filter(None, (model, base)):
        task.test, task.ood = (metrics.that_fit(lm, side, limit) for side in (task.test, task.ood))
    if not task.test:
        raise ValueError(f"--task {task.name}: no question fits beside an answer of {limit} tokens; lower --max-new-tokens")
    print(f"{task.name}: {len(task.test)} questions, in answers of up to {limit} tokens", file=sys.stderr)
    metrics.warn_of_foreign_words(model, task)
    report = {"task": task.name, "n": len(task.test), "date": getattr(model.tokenizer, "today", "")}
    report["model"] = one_model(model, task, limit, cache)
    if base:
        report["base"] = one_model(base, task, limit, cache)
        scored = [e.answer is not None for e in task.test]
        hits = lambda who: list(compress(report[who]["alone"]["correct"], scored))
        report["paired"] = metrics.paired(hits("model"), hits("base")) if any(scored) else None
        report["drift"] = metrics.drift(model, base, task, task.test, limit, cache)
    report["answers"] = answers_of(report, task)
    return report


def answers_of(report: dict, task: Task) -> list[dict]:
    """The rows of answers.jsonl; the texts leave the report, where nobody would look for them."""
    rows = []
    for examples, parts in ((task.test, ("alone", "with_reference")), (task.ood, ("ood", "ood_with_reference"))):
        found = {(who, part): report[who][part] for who in ("base", "model") for part in parts if part in report.get(who, {})}
        columns = {who + "_with_reference" * part.endswith("with_reference"): dict(x) for (who, part), x in found.items()}
        rows += metrics.answer_rows(examples if found else [], columns)
        for measured in found.values():
            del measured["texts"]
    return rows


def one_task(report: dict) -> str:
    """A family per row, for one task."""
    m = report["model"]
    columns = {"alone": m["alone"], "with reference": m["with_reference"]}
    if "base" in report:
        columns = {"base": report["base"]["alone"], **columns}
    text = f"{report['task']}, {report['n']} questions\n\n{metrics.table(columns)}"
    if "ood" in m:
        both = {"base": report["base"]["ood"]} if "base" in report else {}
        both |= {"alone": m["ood"], "with reference": m["ood_with_reference"]}
        text += f"\n\nout of distribution\n\n{metrics.table(both)}"
    text += f"\n\nlength {m['alone']['length']:.1f} tokens | ended by itself {m['alone']['eos']:.0f} % | abstained "
    text += f"{m['alone']['abstained']:.0f} % | entropy {m['entropy']:.3f} nats | gold PPL {m['gold_ppl']:.3f}"
    if "base" in report:
        p, text = report["paired"], text + "\nagainst the base, over all questions: "
        if p:
            text += f"{p['difference']:+.1f} points [{p['interval'][0]:+.1f}, {p['interval'][1]:+.1f}], "
            text += f"{p['wins']} gained, {p['losses']} lost | "
        text += " | ".join(f"{k} {v:.4f}" for k, v in report["drift"].items())
    return text


def rows_of(reports: list[dict]) -> dict[str, dict[str, tuple[float, list[float]]]]:
    """{model or base: {column: (accuracy, interval)}}, a column per task, its out-of-distribution task right behind it;
    none for a task that cannot be scored.
    """
    rows: dict = {}
    for r in reports:
        for who in ("base", "model"):
            for part, name in (("alone", r["task"]), ("ood", f"{r['task']} (out of distribution)")):
                if who in r and part in r[who] and r[who][part]["accuracy"] is not None:
                    found = r[who][part]
                    hits = sum(found["correct"])
                    rows.setdefault(who, {})[name] = (found["accuracy"], list(metrics.wilson(hits, found["scored"])))
    return rows


def table_1(reports: list[dict]) -> str:
    """Rows are models, columns are tasks, the last is their mean."""
    rows = rows_of(reports)
    if not rows:
        return "nothing here can be scored"
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " | mean |", "|---" * (len(columns) + 2) + "|"]
    for who, cells in rows.items():
        shown = [f"{cells[c][0]:.1f} [{cells[c][1][0]:.0f}, {cells[c][1][1]:.0f}]" for c in columns]
        lines.append(f"| {who} | " + " | ".join(shown) + f" | **{sum(v for v, _ in cells.values()) / len(cells):.1f}** |")
    return "\n".join(lines)


@checkpoint.command("eval.py", MEMORY, "stopped; answers in --out are used again by the same command")
def main(argv: list[str] | None = None) -> int:
    """Held-out accuracy of any checkpoint, alone and with the reference; with --base also how far it has drifted from it."""
    how = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="eval.py", description=main.__doc__, formatter_class=how, allow_abbrev=False)
    path = dict(type=os.path.expanduser)
    parser.add_argument("--model", required=True, help="short name, hub id, or folder (a run's --out)", **path)
    parser.add_argument("--base", default="", help="compare with this model and measure drift from it ('' = do not)", **path)
    what = f"tiny, bfcl, a benchmark, a .jsonl file, or all ({', '.join(TABLE_1)}) ('' = the run's, else tiny)"
    parser.add_argument("--task", "--data", default="", help=what, **path)  # --data: as train.py calls it
    many = "questions per family of the tiny world, else per task (0 = all; for the tiny world, which has no end, 100)"
    parser.add_argument("--size", type=int, default=100, help=many)
    parser.add_argument("--max-new-tokens", type=int, default=0, help="longest answer (0 = the run's, else the task's)")
    parser.add_argument("--sample-batch", type=int, default=256, help="prompts answered together; bounds memory")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="matmul precision")
    parser.add_argument("--date", default="", help="the day that chat templates with a date show ('' = the run's, else today)")
    where = "folder for eval.json, eval.md, eval.png and the answers ('' = only print)"
    parser.add_argument("--out", default="", help=where, **path)
    args = parser.parse_args(argv)
    for name, least in (("size", 0), ("max_new_tokens", 0), ("sample_batch", 1)):
        if (value := vars(args)[name]) < least:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is below {least}")
    with tempfile.TemporaryDirectory() as scratch:
        reports = run(args, Path(args.out or scratch) / "answers")
    text = "\n\n".join(map(one_task, reports))
    if len(reports) > 1:
        text = table_1(reports) + "\n\n" + text
    try:
        if args.out:
            with checkpoint.disk("the report", "free space and start again: answers in --out are used again"):
                write(reports, text, Path(args.out))
    finally:
        print(text)
    return 0


def write(reports: list[dict], text: str, out: Path) -> None:
    """What --out receives, the answers in a file of their own."""
    answers = [row for report in reports for row in report.pop("answers")]
    (out / "eval.json").write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")  # first: it says whose the others are
    (out / "eval.md").write_text(text + "\n", encoding="utf-8", errors="replace")
    metrics.write_rows(out / "answers.jsonl", answers)
    if rows := rows_of(reports):
        bars(rows, out / "eval.png")


def check_out(args) -> None:
    """Raises ValueError if --out cannot be written, or holds a file of somebody else that a report would replace."""
    out, earlier = checkpoint.writable(args.out, models=(args.model, args.base)), Path(args.out) / "eval.json"
    theirs = [name for name in ("eval.json", "eval.md", "eval.png", "answers.jsonl") if (out / name).exists()]
    ours = earlier.is_file() and earlier.read_text(encoding="utf-8", errors="replace").startswith('[\n {\n  "task"')
    if theirs and not ours:
        raise ValueError(f"--out {out} holds {theirs[0]}, which is of no evaluation: choose another folder")


def run(args, cache: Path) -> list[dict]:
    """A report per task that can be loaded. Raises ValueError if none can, or a model cannot."""
    if args.out:
        check_out(args)
    today, saved = day(args.date, args.model), settings_behind(args.model)
    wanted, tasks, problems = args.task or saved.get("data", "tiny"), [], []
    for name in TABLE_1 if wanted == "all" else (wanted,):  # before the models: loading these takes longer
        try:
            kind = {"references": saved.get("references", "blotted")} if name == "tiny" else {}
            tasks.append(load_task(name, train_size=None, test_size=args.size, **kind)[0])
        except ValueError as error:
            problems.append(str(error))
    if not tasks:
        raise ValueError(problems[0])
    for problem in problems:
        print(f"eval.py: left out: {problem}", file=sys.stderr)
    device, dtype, reason = choose_device(args.device, args.dtype)
    print(reason, file=sys.stderr)
    model = load(args.model, device)
    base = load_base(args.base, device, model) if args.base else None
    for lm in filter(None, (model, base)):
        lm.dtype, lm.sample_batch, lm.tokenizer.today = dtype, args.sample_batch, today
    # A run's answers are measured at the length it was trained with.
    limit = args.max_new_tokens or saved.get("max_new_tokens", 0)
    return [evaluate(model, base, task, limit, cache) for task in tasks]


if __name__ == "__main__":
    sys.exit(main())
