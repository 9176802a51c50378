"""asking.py - the command line of explain.py: which model, which question, under which settings of the loss.

These are Config's own, with train.py's names, help and checks, so that an answer can be looked into under the very loss of a run.
It exists apart so that explain.py can be about the answer.

Depends on config.py, loading.py.   Try it:  python explain.py --help
"""

import argparse
import math
import os
from dataclasses import fields

from engine.config import PRESETS, Config, add_flag, day, make
from engine.loading import Loaded, choose_device, load, load_base
from engine.pretrained import SHORT, speaks_world

TEXTS = {
    "--question": "the same, by name",
    "--reference": "a worked solution, which only the teacher sees (default: the tiny world's own, or the file's)",
    "--wrong": "a wrong reference, for the contrast; '' = none (default: the tiny world's own, or the file's)",
    "--answer": "the answer to look into (default: the model's own)",
    "--model": "the student: short name, hub id, or folder (default: tiny)",
    "--base": "the model that teaches; of a run with a frozen teacher, what it began with (default: the student itself)",
    "--data": "whose solved questions the contexts show: tiny, a .jsonl file, a benchmark (default: tiny for a tiny model)",
    "--html": "a file for a page: a card for each token with the five likeliest of student and teacher, and all prompts",
}
SETTINGS = "contexts demos context_reference agreement gamma stat divergence alpha clip w_contrast margin max_new_tokens"
SETTINGS = [*SETTINGS.split(), "contexts_include_teacher", "max_prompt_tokens", "seed", "date", "device", "dtype"]
DEFAULTS = dict(contexts="3 with --data, else 0 = none", agreement="token", w_contrast="0.1 with a wrong reference")
EPILOG = """questions of the tiny world, whose references are known:
  "89+72"     "largest: A 47, B 38, C 91"     "where is bell: mill, cave, port, barn"
  "f: add 3 then times 2"     "tool: fly rome 2 monday"
A training question has the reference of training, a quarter of it blotted out; any other one has it whole.
"""


def parse(argv: list[str] | None, description: str) -> tuple[argparse.Namespace, Config]:
    """What is asked, and the checked settings. What makes no sense ends the program with one line and code 2."""
    how = dict(formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG, allow_abbrev=False)
    parser = argparse.ArgumentParser("explain.py", "python explain.py [QUESTION] [--flag VALUE ...]", description, **how)
    parser.error = lambda message: parser.exit(2, f"explain.py: {message}\n")
    utf8 = lambda text: text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a shell may hand over any bytes
    ask = "what the model is asked; without one, you are asked, again and again"
    parser.add_argument("asked", nargs="?", type=utf8, metavar="QUESTION", help=ask)
    for name, help in TEXTS.items():
        kind = os.path.expanduser if name in ("--model", "--base", "--data", "--html") else utf8
        parser.add_argument(name, type=kind, metavar="TEXT", help=help)
    parser.add_argument("--temperature", type=float, default=0.0, help="of the model's own answer (default: 0 = greedy)")
    for f in (f for f in fields(Config) if f.name in SETTINGS):
        tiny = f"; tiny world: {PRESETS['tiny'][f.name]}" if f.name in PRESETS["tiny"] else ""
        add_flag(parser, f, argparse.SUPPRESS, f"{f.metadata['help']} (default: {DEFAULTS.get(f.name, f.default)}{tiny})")
    parser.set_defaults(model="tiny")
    args = parser.parse_args(argv)
    args.question = args.question if args.asked is None else args.asked
    tiny = speaks_world(SHORT.get(args.model, args.model))
    args.data = ("tiny" if tiny else "") if args.data is None else args.data
    try:
        if args.question is None and any(x is not None for x in (args.reference, args.wrong, args.answer, args.html)):
            raise ValueError("--reference, --wrong, --answer and --html belong to a question: add --question")
        for name in ("question", "reference", "answer"):
            if vars(args)[name] is not None and not vars(args)[name].strip():
                raise ValueError(f"--{name} is empty: give a text, or leave it out")
        if not 0 <= args.temperature < math.inf:
            raise ValueError(f"--temperature {args.temperature} must be 0 (greedy) or more")
        if "contexts" in args and args.contexts and not args.data:
            raise ValueError(f"--contexts {args.contexts} needs solved examples of other questions: add --data file.jsonl")
        # Only what was given by hand is in the namespace: the rest is what the preset and plain self-distillation say.
        given = dict(contexts=3 if args.data else 0, agreement="token", w_contrast=0.1)
        given |= {name: value for name, value in vars(args).items() if name in SETTINGS}
        given |= {} if given["contexts"] else dict(agreement="none")
        return args, make("sd", model=args.model, preset="tiny" if tiny else "real", **given)
    except ValueError as error:
        parser.error(error)


def load_models(args: argparse.Namespace, cfg: Config) -> tuple[Loaded, Loaded]:
    """The student, and whoever teaches. Raises ValueError if a model cannot serve, or if their tokens differ."""
    device, dtype, _ = choose_device(cfg.device, cfg.dtype)
    lm = load(args.model, device)
    base = load_base(args.base, device, lm) if args.base else lm
    today = day(cfg.date, args.model)
    for model in (lm, base):
        model.dtype, model.tokenizer.today = dtype, today
    if "max_new_tokens" not in args:
        cfg.max_new_tokens = min(cfg.max_new_tokens, lm.context // 2)
    return lm, base
