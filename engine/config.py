"""config.py - every setting, once: this dataclass is the command line, the record in a checkpoint and the documentation.

`Config` adds to unisd.Mechanisms all that a run needs. unisd.RECIPES are a few overrides of it each: there is no code behind a
recipe's name, so mechanisms compose by flags on any of them:  python train.py --recipe ema --clip 2.0

Order of precedence: the dataclass < PRESETS (what the model needs) < RECIPES < PRESET_RECIPES < flags given by hand. It exists so
that a setting has one place, one help text and one record; what contradicts itself or can have no effect is refused, or warned
about, by name and with the fix, before anything is loaded.

Depends on unisd.py (for Mechanisms).   Try it:  python train.py --help
"""

import argparse
import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from datetime import date, datetime
from pathlib import Path

from losses import LN2
from unisd import RECIPES, Mechanisms, opt

# What a model of this size needs, whatever the recipe. "auto" takes tiny for --model tiny and real for everything else.
SMALL = dict(lr=1e-3, steps=240, batch=48, micro_batch=48, gamma=1.0, temperature=1.0, max_new_tokens=40)
SMALL |= dict(max_tokens_per_pass=1024)  # on a CPU small passes are faster: they stay in its cache
OFFICIAL = dict(data="scienceqa", steps=0, epochs=1.0, train_size=0, batch=64, lr=2e-5)
OFFICIAL |= dict(lora_rank=64, lora_alpha=128, lora_dropout=0.05, eval_size=0)
PRESETS: dict[str, dict] = {
    "tiny": SMALL,
    "real": OFFICIAL | dict(lora_rank=0, lora_dropout=0.0, lr=5e-6, eval_size=500),
    "official": OFFICIAL | dict(context_reference=False, context_kind="retrieval"),
}
# Contexts for the least certain quarter of the answers were 4.2 +- 1.2 points better than for all, and cheaper (docs/results.md);
# --agreement-budget 1 is the paper's UniSD*. The official scripts halve the batch and weaken gamma for it.
QUARTER, GENTLE = dict(agreement_budget=0.25), dict(gamma=0.001, batch=32)
PRESET_RECIPES = {("tiny", "unisd-star"): QUARTER, ("real", "unisd-star"): GENTLE | QUARTER, ("official", "unisd-star"): GENTLE}
# What still differs under --preset official, said at the start of such a run.
DEPARTURES = (
    "sequence weights act (theirs cancel): --normalizer sequence for theirs",
    "the EMA teacher moves under LoRA (theirs does not): --teacher frozen for what theirs computes",
    "the loss is at temperature 1 (theirs at the sampling temperature): --distill-temperature 0.7 for theirs",
    "a mean over the step's tokens (theirs: of per-sequence means, per micro-batch): --normalizer sequence",
    "negatives are by rule (--negatives model as theirs), verified, in the reference's template; contexts in the task's format",
    "contexts are retrieved by the model's own states (theirs: all-MiniLM-L6-v2); GPQA is gpqa_main (theirs: gpqa_extended)",
    "the batch is 64, for UniSD* 32 (theirs depends on model size and devices), the seed 0 (theirs 42)",
    "an epoch is rounded to whole steps (theirs drops the last incomplete batch); weights are fp32 (theirs bf16)",
)
SETTINGS = "settings.json"  # in --out; config.json there is the model's
AT_LEAST_ONE = "batch micro_batch sample_batch max_new_tokens top_k max_tokens_per_pass ema_every demos".split()
SHARES = "agreement_budget on_policy wrong_references clip_quantile warmup lora_dropout".split()  # at most 1
ABOVE_ZERO = "temperature distill_temperature agreement_temperature".split()
CONTEXT_KINDS = ("random", "retrieval", "induction")


@dataclass
class Config(Mechanisms):
    """One run. Field order is the order of --help."""

    model: str = opt("tiny", "short name (tiny, Qwen2.5-0.5B, ...), hub id, or folder")
    data: str = opt("tiny", "what to learn: tiny, a benchmark (scienceqa, mbpp, gsm8k, ...), or your own file.jsonl")
    recipe: str = opt("unisd-star", "a row of the paper's table: a few overrides of these settings", tuple(RECIPES))
    preset: str = opt("auto", "settings for a model size; auto picks by --model", ("auto", *PRESETS))
    seed: int = opt(0, "seeds the data order, the sampling and the dropout")
    out: str = opt("", "folder for log, curves, checkpoints, summary ('' = runs/[<model>-<data>-]<recipe>-seed<seed>)")
    dry_run: bool = opt(False, "say what the run would do and cost, then stop; nothing is downloaded")
    resume: bool = opt(False, "go on from the last checkpoint in --out, bit for bit")
    date: str = opt("", "the day that chat templates with a date show, YYYY-MM-DD ('' = that of the run's start)")
    # --- the teacher
    teacher: str = opt("frozen", "frozen = as it was; ema = slow average, eq. 3; live = the student", ("frozen", "ema", "live"))
    ema_decay: float = opt(0.9, "share of the old teacher kept at each update")
    ema_every: int = opt(10, "optimizer steps between two EMA updates")
    contexts: int = opt(3, "K: how many contexts the agreement compares")
    contexts_include_teacher: bool = opt(False, "the teacher's own prompt takes the place of the first of the K")
    agreement_budget: float = opt(1.0, "score contexts for this share of the sequences, the least certain; others keep weight 1")
    uncertainty: str = opt(
        "entropy", "by the teacher's entropy, its divergence (one more pass), or at random", ("entropy", "divergence", "random")
    )
    demos: int = opt(1, "solved examples in each context")
    context_kind: str = opt("random", "a context shows random or similar solved examples, or an induced instruction", CONTEXT_KINDS)
    context_reference: bool = opt(True, "contexts also hold the question's own reference")
    fresh_references: bool = opt(False, "tiny world: each context's reference has other blots, and is wrong or not by itself")
    negatives: str = opt("rule", "wrong references: by rule, or model-written; both verified wrong", ("rule", "model"))
    # --- sampling
    on_policy: float = opt(1.0, "share of the steps trained on the student's own answers; the others use the references")
    sft_target: str = opt("reference", "what off-policy steps imitate; worked: tiny world only", ("reference", "worked"))
    sampler: str = opt("student", "who writes the answers: the student, or the frozen base model", ("student", "base"))
    temperature: float = opt(0.7, "sampling temperature; has no effect on the loss")
    max_new_tokens: int = opt(1024, "longest answer")
    max_prompt_tokens: int = opt(3072, "longest prompt; a longer reference is cut, never the question")
    # --- optimisation
    steps: int = opt(300, "optimizer steps (0 = as many as --epochs needs)")
    epochs: float = opt(0.0, "passes over the training questions, where --steps is 0 (both 0 = only evaluate)")
    batch: int = opt(64, "prompts per optimizer step")
    micro_batch: int = opt(4, "sequences per forward and backward; bounds memory, never changes the result")
    sample_batch: int = opt(64, "prompts sampled together; need not be the micro-batch")
    chunk: int = opt(0, "tokens through the head together; bounds memory, never changes the result (0 = auto)")
    max_tokens_per_pass: int = opt(16384, "rows x longest row of a scoring pass; bounds memory, no effect on results")
    lr: float = opt(2e-5, "peak learning rate, AdamW")
    warmup: float = opt(0.1, "share of the steps with a rising learning rate; then cosine to 0")
    weight_decay: float = opt(0.0, "AdamW weight decay")
    grad_norm: float = opt(1.0, "the gradient is scaled down to this norm (0 = never)")
    lora_rank: int = opt(0, "train LoRA factors of this rank instead of all weights; needs peft (0 = all weights)")
    lora_alpha: int = opt(128, "LoRA scale is alpha / rank")
    lora_dropout: float = opt(0.0, "dropout before the LoRA factors")
    grad_checkpointing: bool = opt(False, "recompute activations in the backward: less memory, about a third more time")
    shard: bool = opt(False, "divide weights, optimizer and EMA among the processes of torchrun (FSDP2)")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps (auto never picks mps)")
    dtype: str = opt("auto", "matmul precision; weights stay fp32; fp16 scales the loss", ("auto", "fp32", "bf16", "fp16"))
    # --- data
    wrong_references: float = opt(0.0, "tiny world: share of training questions whose reference is wrong")
    references: str = opt("blotted", "tiny world: their kind, see docs/when-it-helps.md", ("blotted", "faint", "distinct", "odd"))
    train_size: int = opt(4000, "number of training questions (0 = all that a data set has)")
    # --- watching
    eval_size: int = opt(100, "held-out questions before and after: per family of the tiny world, else per data set (0 = all)")
    privileged: bool = opt(False, "let the final evaluation see the references: the ceiling as a row of its own")
    teacher_every: int = opt(40, "steps between two measurements of the teacher's accuracy with the reference (0 = never)")
    sample_every: int = opt(40, "steps between two printed samples (0 = never)")
    save_every: int = opt(60, "steps between two checkpoints (0 = only at the end)")

    def __post_init__(self):
        self.model, self.data, self.out = map(os.path.expanduser, (self.model, self.data, self.out))

    @property
    def uses_agreement(self) -> bool:
        return super().uses_agreement and bool(self.agreement_budget)

    @property
    def uses_base(self) -> bool:
        """Does the run need the model as it was, beside the one that is trained?"""
        return (self.teacher == "frozen" and self.uses_teacher) or self.sampler == "base"

    @property
    def uses_average(self) -> bool:
        return self.teacher == "ema" and self.uses_teacher


def parse(argv: list[str] | None = None) -> Config:
    """The command line -> a checked Config. Unknown flags and recipes exit with code 2 and say what exists."""
    about = "Improve a model with its own answers, re-read with a reference in view (UniSD). The defaults shown are those of the "
    about += "--model, --preset and --recipe beside --help."
    how = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, add_help=False)
    parser = argparse.ArgumentParser("train.py", description=about, **how)
    # Not argparse's own: that would print the dataclass's defaults, before the model and the recipe have set theirs.
    parser.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS, help="show this and exit")
    for f in sorted(fields(Config), key=lambda f: f in fields(Mechanisms)):  # what is inherited comes last
        add_flag(parser, f, f.default, f.metadata["help"])
    first = parser.parse_args(argv)
    parser.set_defaults(**layers(first.model, first.preset, first.recipe))
    # Under its own settings; what is given by hand on top is compared with them (checkpoint.claim).
    if first.resume:
        saved = saved_settings(default_out(parser.parse_args(argv)))
        parser.set_defaults(**{f.name: saved[f.name] for f in fields(Config) if f.name in saved})
    if "help" in first:
        parser.print_help()
        parser.exit()
    try:
        return check(Config(**vars(parser.parse_args(argv))))
    except ValueError as error:
        parser.exit(2, f"train.py: {error}\n")


def add_flag(parser: argparse.ArgumentParser, setting: Field, default, help: str) -> None:
    """The flag of one field of Config: --name VALUE, of its type and among its choices; --name and --no-name where it is a bool."""
    how = dict(type=type(setting.default), choices=setting.metadata["choices"] or None)
    how = dict(action=argparse.BooleanOptionalAction) if isinstance(setting.default, bool) else how
    parser.add_argument(flag(setting.name), default=default, help=help, **how)


def layers(model: str, preset: str, recipe: str) -> dict:
    """The overrides that a model, a preset and a recipe bring, later ones winning."""
    if preset == "auto":
        preset = "tiny" if model == "tiny" else "real"
    return PRESETS[preset] | RECIPES[recipe] | PRESET_RECIPES.get((preset, recipe), {})


def make(recipe: str = "unisd-star", **overrides) -> Config:
    """The Config of a recipe from Python, for tests, notebooks and studies: make("ema", clip=2.0)."""
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} does not exist; there are {', '.join(RECIPES)}")
    given = layers(overrides.get("model", "tiny"), overrides.get("preset", "auto"), recipe) | overrides
    return check(Config(recipe=recipe, **given))


def check(cfg: Config) -> Config:
    """Refuse what makes no sense (ValueError naming the flag and the fix) and warn about what can have no effect."""
    for why in contradictions(cfg):
        raise ValueError(why)
    for why in without_effect(cfg):
        warnings.warn(why, stacklevel=2)
    return cfg


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def contradictions(cfg: Config) -> Iterator[str]:
    """What to say of settings that make no sense, each on its own and together."""
    for f in fields(cfg):
        value, name, choices = getattr(cfg, f.name), flag(f.name), f.metadata["choices"]
        if choices and value not in choices:
            yield f"{name} {value!r} does not exist; choose from {', '.join(choices)}"
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name} is {value}; it must be a finite number"
        if isinstance(value, int | float) and value < 0:
            yield f"{name} {value} is negative; 0 switches a setting off"
        if f.name in AT_LEAST_ONE and value < 1:
            yield f"{name} must be at least 1, got {value}"
        if f.name in SHARES and value > 1:
            yield f"{name} {value} is outside [0, 1]"
        if f.name in ABOVE_ZERO and value == 0:
            yield f"{name} must be above 0 (training samples; evaluation is always greedy)"
    if not any(weight for name, weight in vars(cfg).items() if name.startswith("w_")):
        yield "every weight is 0 (--w-div, --w-nll, --w-match, --w-contrast): there is nothing to minimise"
    if cfg.divergence == "jsd" and not 0 < cfg.alpha < 1:
        yield f"--alpha {cfg.alpha} must lie strictly between 0 and 1, where a JSD is 0; use --divergence forward or reverse"
    if cfg.estimator == "sampled" and cfg.divergence != "reverse":
        yield f"--estimator sampled with --divergence {cfg.divergence}: one token estimates a reverse KL; add --divergence reverse"
    if cfg.data == "tiny" and not (cfg.train_size and cfg.eval_size):
        yield "--train-size and --eval-size must be at least 1 for --data tiny: a procedural world has no end"
    if cfg.data != "tiny" and (cfg.wrong_references or cfg.references != "blotted" or cfg.fresh_references):
        what = "--wrong-references, --references and --fresh-references work"
        yield f"{what} in the tiny world only: leave them out, or use --data tiny"
    if cfg.clip and cfg.clip_quantile:
        yield "--clip and --clip-quantile are two ceilings for one divergence: set one of them to 0"
    if cfg.agreement != "none" and cfg.contexts < 2:
        why = "the variance of one reading is undefined" if cfg.stat != "range" else "the range of one reading is always 0"
        yield f"--contexts {cfg.contexts} with --agreement {cfg.agreement}: {why}; set --contexts 2 or more, or --agreement none"
    if cfg.shard and cfg.lora_rank:
        yield "--shard divides what is trained, and LoRA trains little: leave out one of --shard and --lora-rank"
    day(cfg.date)  # raises what would be said of it
    if cfg.teacher == "ema" and not 0 < cfg.ema_decay < 1:
        yield f"--ema-decay {cfg.ema_decay}: 1 never moves, 0 is the student; use a value between, or --teacher frozen or live"


def without_effect(cfg: Config) -> Iterator[str]:
    """What to say of settings that cannot act, or hardly can."""
    if cfg.divergence == "jsd" and cfg.clip >= LN2:
        yield f"--clip {cfg.clip} can never act: a JSD is at most ln 2 = {LN2:.3f}; set it below that, or use --divergence forward"
    if cfg.agreement != "none" and not cfg.w_div:
        yield "--agreement has no effect: it weighs the divergence, and --w-div is 0"
    if (cfg.clip or cfg.clip_quantile) and not cfg.w_div:
        yield "--clip has no effect: it caps the divergence, and --w-div is 0"
    if cfg.teacher == "ema" and not cfg.uses_teacher:
        yield "--teacher ema has no effect: nothing in this recipe asks a teacher"
    if cfg.agreement != "none" and 0 in (cfg.gamma, cfg.agreement_budget):
        yield "--agreement has no effect: --gamma or --agreement-budget is 0, so every weight is 1 and no context is read"
    for name, acts in (("contexts_include_teacher", True), ("fresh_references", cfg.context_reference)):
        if vars(cfg)[name] and not (cfg.uses_agreement and acts):
            why = "holds a reference (see --context-reference)" if cfg.uses_agreement else "is read (see --agreement)"
            yield f"{flag(name)} has no effect: no context {why}"
    own_samples = cfg.sampler == "student" and cfg.on_policy == 1 and cfg.temperature == cfg.distill_temperature
    if cfg.estimator == "sampled" and not own_samples:
        fix = "set --temperature and --distill-temperature equal, --on-policy 1 and --sampler student"
        yield f"--estimator sampled is biased: it needs the student's own samples at the temperature of the loss; {fix}"
    if cfg.lora_rank > 0 and cfg.lr < 1e-5:
        yield f"--lr {cfg.lr} is a rate for training all weights; LoRA factors usually need 1e-5 to 2e-4"
    if cfg.teacher == "ema" and 0 < cfg.steps < cfg.ema_every:
        yield f"the EMA teacher never moves: {cfg.steps} steps are fewer than --ema-every {cfg.ema_every}"


def default_out(cfg: Config) -> str:
    """--out, or where a run goes that was given none: runs/sd-seed0, runs/Qwen2.5-0.5B-my-sd-seed0 (with my.jsonl)."""
    names = [name for name in (Path(cfg.model).name, Path(cfg.data).stem) if name not in ("tiny", "")]
    return cfg.out or "runs/" + "-".join([*names, cfg.recipe, f"seed{cfg.seed}"])


def saved_settings(out: str) -> dict:
    """The settings of the run in `out`; {} if there is none. Raises ValueError if the file is damaged."""
    path = os.path.join(out, SETTINGS)
    if not out or not os.path.isfile(path):  # unlike Path's, these never raise
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): repair it, or choose another folder") from error
    return found if isinstance(found, dict) and {"recipe", "model", "seed"} <= found.keys() else {}  # else it is someone else's


def settings_behind(model: str) -> dict:
    """The settings of the run that `model` is, or is a checkpoint of; {} if it is of no run."""
    return saved_settings(model) or (saved_settings(str(Path(model).parent)) if Path(model).match("checkpoint-*") else {})


def day(given: str, folder: str = "") -> str:
    """The day that dated chat templates show: as given, else of the run behind `folder`, else today. ValueError if it is none."""
    try:
        datetime.fromisoformat(given or "2026-11-27")
    except ValueError as error:
        raise ValueError(f"--date {given!r} is no day; write it as 2026-11-27") from error
    return given or settings_behind(folder).get("date") or str(date.today())
