"""peers.py - the same work in another trainer: TRL's SDFTTrainer and GKDTrainer beside ours.

    pip install --no-deps trl accelerate                 TRL is never a requirement
    python -m experiments.peers                          accuracy and drift, 3 seeds
    python -m experiments.peers --time                   seconds a step and memory, in turns (leave the machine alone meanwhile)

Two programs that were written apart and end at the same accuracy and the same drift are the best evidence there is that both
compute what they say. Equal in both: base model, questions and their order, prompts, batch, steps, AdamW, learning rate by step,
gradient clipping, temperature, divergence, frozen teacher, and eval.py, which measures both; what is not: docs/cost.md.

Depends on train.py, eval.py, TRL.   Try it:  python -m pytest tests/test_peers.py -q
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.data import SequentialSampler

import train
from engine import build, checkpoint
from engine.config import Config, parse
from engine.loading import load
from engine.rollout import right_pad, turn_end
from experiments.study import ROOT, SETTINGS, spread
from tasks.data import chat_ids, teacher_message, text_ids

with contextlib.suppress(ImportError):
    import resource  # not on Windows

PAIRS = {"sd": {"trl": "TRL's SDFTTrainer"}}  # recipe -> sides that do the same
PAIRS["gkd"] = {"trl": "TRL's GKDTrainer", "trl-own": "the same, divided by its own tokens"}


class WithReference(nn.Module):
    """GKDTrainer shows its teacher the student's input; this one puts the reference in. `longer`: a student's prompt ids -> its."""

    def __init__(self, base: nn.Module, longer: dict[tuple, list[int]]):
        super().__init__()
        self.base, self.longer, self.lengths = base, longer, sorted({len(p) for p in longer})
        self.config = base.config

    def forward(self, input_ids, attention_mask):
        """(B, T) twice -> .logits (B, T, V) where the student has its answer; zero in the prompt, where nobody looks."""
        rows, places = [], []
        for ids, seen in zip(input_ids, attention_mask.bool(), strict=True):
            row, at = ids[seen].tolist(), seen.nonzero().squeeze(1)
            n = next(n for n in self.lengths if tuple(row[:n]) in self.longer)
            rows.append([*self.longer[tuple(row[:n])], *row[n:]])
            places.append(at[n - 1 :])  # from the position that predicts the first token on
        ids, mask = right_pad(rows, input_ids.device)
        logits = self.base(input_ids=ids, attention_mask=mask).logits
        out = logits.new_zeros(*input_ids.shape, logits.shape[-1])
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            out[i, place] = logits[i, len(row) - len(place) : len(row)]
        return SimpleNamespace(logits=out)


def with_trl(cfg: Config, out: Path, own_tokens: bool) -> list[float]:
    """The run that `cfg` describes, in TRL; the model goes to `out`. -> seconds of each step."""
    from datasets import Dataset
    from transformers import TrainerCallback, set_seed
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.begun = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - self.begun)

    class InOrder(GKDTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset or self.train_dataset)

        def compute_loss(self, *args, num_items_in_batch=None, **named):
            return super().compute_loss(*args, num_items_in_batch=None if own_tokens else num_items_in_batch, **named)

    seconds: list[float] = []
    set_seed(cfg.seed)
    base = out / "base"  # SDFTTrainer reads its teacher from the folder of the student
    load(cfg.model, torch.device("cpu")).save(base)
    lm, (task, _) = load(str(base), torch.device("cpu")), build.task_of(cfg)
    chosen = [task.train[i] for i in train.order(len(task.train), cfg.seed, 0, cfg.steps * cfg.batch)]
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: train.schedule(step, cfg))
    common = dict(output_dir=str(out), max_steps=cfg.steps, per_device_train_batch_size=cfg.batch, max_grad_norm=cfg.grad_norm)
    common |= dict(temperature=cfg.temperature, seed=cfg.seed, bf16=False, gradient_checkpointing=False, use_cpu=True)
    common |= dict(report_to="none", save_strategy="no", logging_steps=1000, dataloader_pin_memory=False, disable_tqdm=True)
    given = dict(model=lm.model, processing_class=lm.tokenizer, optimizers=(optimizer, rate), callbacks=[Clock])
    if cfg.recipe == "sd":
        template = teacher_message(task.wording, "{prompt}", "{privileged_context}")
        rows = [{"prompt": [{"role": "user", "content": e.question}], "privileged_context": e.reference} for e in chosen]
        settings = dict(distillation_mode="full_logits", distillation_alpha=0.0, distillation_is_clip=None, num_generations=1)
        settings |= dict(max_completion_length=cfg.max_new_tokens, shuffle_dataset=False, teacher_prompt_template=template)
        trainer = SDFTTrainer(args=SDFTConfig(**common, **settings), train_dataset=Dataset.from_list(rows), **given)
    else:
        student = [chat_ids(lm.tokenizer, e.question) for e in chosen]
        teacher = [chat_ids(lm.tokenizer, teacher_message(task.wording, e.question, e.reference)) for e in chosen]
        said = [[*text_ids(lm.tokenizer, e.target or e.reference), turn_end(lm)] for e in chosen]
        pairs = [*zip(student, said, strict=True)]
        rows = [dict(prompt=lm.tokenizer.decode(p), input_ids=p + s, completion_mask=[0] * len(p) + [1] * len(s)) for p, s in pairs]
        reader = WithReference(load(str(base), torch.device("cpu")).model, dict(zip(map(tuple, student), teacher, strict=True)))
        settings = dict(lmbda=cfg.on_policy, beta=cfg.alpha, max_new_tokens=cfg.max_new_tokens)
        args = GKDConfig(**common, **settings)
        trainer = InOrder(teacher_model=reader, args=args, train_dataset=Dataset.from_list(rows), **given)
    trainer.train()
    lm.save(out)
    return seconds


def with_ours(cfg: Config, out: Path) -> list[float]:
    """The same run here. -> seconds of each step."""
    cfg.out, cfg.resume = str(out), (out / "settings.json").exists()
    if not train.main(cfg):
        sys.exit(130)  # stopped by Ctrl-C: not done, and goes on the next time
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [sum(value for key, value in step.items() if key.startswith("s_")) for step in steps]


def one(side: str, cfg: Config, out: Path) -> None:
    """One training, in a process of its own: its seconds a step and how far its memory rose go to <out>/cost.json."""
    most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if sys.platform == "linux" else float("nan")  # MiB
    before = most()
    seconds = with_ours(cfg, out) if side == "ours" else with_trl(cfg, out, own_tokens=side == "trl-own")
    (out / "cost.json").write_text(json.dumps({"seconds": seconds, "mib": most() - before, "threads": torch.get_num_threads()}))


def command(*arguments: str) -> None:
    """A Python command in the project's folder. Raises ValueError with the last line of what went wrong."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(arguments)}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def start(side: str, recipe: str, seed: int, flags: list[str], out: Path) -> dict:
    """`one` as a subprocess, unless it has been done. -> its cost. Raises ValueError if it fails."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "cost.json").exists():
        command("-m", "experiments.peers", "--one", side, recipe, str(seed), str(out), *flags)
    return json.loads((out / "cost.json").read_text())


def measured(out: Path, cfg: Config, size: int = 100) -> dict:
    """What eval.py says of the model in `out`: accuracy in per cent, JSD to the base in nats a token."""
    if not (out / "eval" / "eval.json").exists():
        same = ["--base", cfg.model, "--data", cfg.data, "--max-new-tokens", str(cfg.max_new_tokens)]
        command("eval.py", "--model", str(out), *same, "--size", str(size), "--out", str(out / "eval"))
    (report,) = json.loads((out / "eval" / "eval.json").read_text())
    return {"accuracy": report["model"]["alone"]["accuracy"], "jsd": report["drift"]["jsd_to_base"]}


@checkpoint.command("peers.py")
def main(argv: list[str] | None = None) -> int:
    """Our trainer and TRL's on the same work, measured by eval.py. Stopped, the same command goes on."""
    parser = argparse.ArgumentParser(prog="peers.py", description=main.__doc__)
    add = parser.add_argument
    add("--recipes", nargs="+", choices=PAIRS, default=list(PAIRS), help="what is compared (default: sd and gkd)")
    add("--seeds", type=int, default=3, help="seeds 0 ... N-1 (default: %(default)s)")
    add("--setting", choices=SETTINGS, default="clean", help="the study's: model, data, batch ... (default: %(default)s)")
    add("--steps", type=int, help="optimizer steps (default: the setting's, with --time 60)")
    add("--time", action="store_true", help="instead: seconds a step, ours and theirs in turns, --seeds times")
    add("--out", help="folder of the runs; what is there is not run again (default: runs/peers-SETTING)")
    add("--one", nargs=4, metavar=("SIDE", "RECIPE", "SEED", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    steps = ["--steps", str(args.steps or 60)] if args.steps or args.time else []
    more = [*SETTINGS[args.setting], "--sample-every", "0", "--teacher-every", "0", *["--eval-size", "1"] * args.time, *steps]
    config = lambda recipe, seed: parse(["--recipe", recipe, "--seed", str(seed), *more])
    if not find_spec("trl"):
        parser.exit(2, "peers.py: TRL is not installed: pip install --no-deps trl accelerate\n")
    if args.one:
        side, recipe, seed, out = args.one
        one(side, config(recipe, seed), Path(out))
        return 0
    folder, found = Path(args.out or f"runs/peers-{args.setting}").resolve() / ("time" if args.time else "runs"), []
    flags = ["--setting", args.setting, *steps, *["--time"] * args.time]
    todo = [(seed, recipe, side) for seed in range(args.seeds) for recipe in args.recipes for side in ("ours", *PAIRS[recipe])]
    for seed, recipe, side in todo:
        out = folder / f"{side}-{recipe}-seed{seed}"
        cost = start(side, recipe, seed, flags, out)
        row = {"recipe": recipe, "side": side, "seed": seed, "steps": len(cost["seconds"]), "threads": cost["threads"]}
        row |= {"step_seconds": statistics.median(cost["seconds"][5:] or cost["seconds"]), "mib": cost["mib"]}
        found.append(row if args.time else row | measured(out, config(recipe, seed)))
        print(json.dumps(found[-1]), flush=True)
    about = {"trl": version("trl"), "torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    (folder.parent / f"{folder.name}.json").write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")
    print(table(found, args.time))
    return 0


def table(found: list[dict], timed: bool) -> str:
    """Markdown: a row per recipe and trainer; mean ± half of a 95 % interval over seeds, or medians and the ratio in turns."""
    head = ["recipe", "trainer", *(["s a step", "ratio", "memory, MiB"] if timed else ["accuracy", "JSD to base"])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    interval = lambda rows, key, d: "{:.{d}f} ± {:.{d}f}".format(*spread(r[key] for r in rows), d=d).replace(" ± nan", "")
    for recipe in dict.fromkeys(row["recipe"] for row in found):
        own = [r for r in found if r["recipe"] == recipe]
        sides = {side: [r for r in own if r["side"] == side] for side in dict.fromkeys(r["side"] for r in own)}
        for side, rows in sides.items():
            name = PAIRS[recipe].get(side, side)
            if timed:
                ratios = [a["step_seconds"] / b["step_seconds"] for a, b in zip(rows, sides["trl"], strict=True)]
                cells = [", ".join(f"{r['step_seconds']:.3f}" for r in rows), f"{statistics.median(ratios):.2f}"]
                cells += [f"{statistics.median(r['mib'] for r in rows):.0f}"]
            else:
                cells = [interval(rows, "accuracy", 1), interval(rows, "jsd", 4)]
            lines.append(f"| {recipe} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
