"""plan.py - what a run will do and cost, before anything is downloaded:  python train.py --model Qwen2.5-7B --dry-run

Steps, passes by mechanism, EMA updates, and an estimate of memory and time. Of N trained and P present parameters, in fp32 bytes:

    memory   4 P weights + 4 N gradients + 8 N Adam + 4 N per average (EMA teacher, frozen copy)
             + activations of one micro-batch + the head's: 4 V (chunk + side + 6 piece; JSD 12), see head.py
             with --shard, the first line is divided by the number of processes (less the embedding), and the layers are
             there whole while answers are sampled and read: 4 P more, 2 P in bf16
    work     2 P per token read, 6 P per token trained (a third more with gradient checkpointing), 2 P per token sampled

The time is that work over the share of a matrix product's speed here that language models usually reach: a factor of 2 or 3 off.
Depends on ema.py, most of engine/, tasks/jsonl.py.   Try it:  python -m pytest tests/test_plan.py -q
"""

import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ema import half_life
from engine import parallel
from engine.config import Config
from engine.head import tokens_per_chunk
from engine.loading import choose_device
from engine.pretrained import ADAPTER, SHORT, base_of, explain_missing
from tasks import jsonl

# Parameters, layers, hidden size, vocabulary: as published with the models. Other hub ids are only known once downloaded.
KNOWN = {
    "Qwen/Qwen2.5-0.5B-Instruct": (494e6, 24, 896, 151_936),
    "Qwen/Qwen2.5-1.5B-Instruct": (1544e6, 28, 1536, 151_936),
    "Qwen/Qwen2.5-3B-Instruct": (3086e6, 36, 2048, 151_936),
    "Qwen/Qwen2.5-7B-Instruct": (7616e6, 28, 3584, 152_064),
    "meta-llama/Llama-3.1-8B-Instruct": (8030e6, 32, 4096, 128_256),
    "google/gemma-3-4b-it": (4300e6, 34, 2560, 262_208),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (134.5e6, 30, 576, 49_152),
}
REACHED = 0.35  # of a plain matrix product's speed, by training; sampling is bound by memory and reaches far less
SAMPLING = 0.03


def size_of(model: str) -> tuple[float, int, int, int] | None:
    """(parameters, layers, hidden size, vocabulary) of a known name or a local folder; None if only a download could tell.
    Raises ValueError if the folder holds no model.
    """
    where = SHORT.get(model, model)
    while (Path(where) / ADAPTER).exists():
        where = base_of(model, Path(where))
    if where in KNOWN or not (Path(where) / "config.json").exists():
        return KNOWN.get(where)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ValueError(explain_missing(model, where, error)) from error
    text, parameters = config.get_text_config(), float(sum(p.numel() for p in empty.parameters()))
    return parameters, text.num_hidden_layers, text.hidden_size, text.vocab_size


def steps_of(cfg: Config, questions: int) -> int:
    """--steps, or where that is 0 as many as --epochs needs. Warns where these are too few for the EMA teacher ever to move."""
    if cfg.steps or not cfg.epochs:
        return cfg.steps
    steps = max(1, round(cfg.epochs * questions / cfg.batch))
    if cfg.uses_average and steps < cfg.ema_every:
        few = f"--epochs {cfg.epochs:g} of {questions} questions are {steps} steps, fewer than --ema-every {cfg.ema_every}"
        warnings.warn(f"the EMA teacher never moves: {few}; raise --epochs, or lower --batch or --ema-every", stacklevel=2)
    return steps


def passes_of(cfg: Config) -> dict[str, float]:
    """Model passes over a step's answers, by what asks for them; a share of the answers is a share of a pass."""
    spared = cfg.contexts_include_teacher and cfg.agreement_budget >= 1  # below 1, contexts have a round of their own
    passes = {
        "student, with gradient": 1,
        "teacher": cfg.uses_teacher,
        "agreement contexts": cfg.uses_agreement and round(cfg.contexts * cfg.agreement_budget, 2) - spared,
        "uncertainty by divergence": cfg.uses_agreement and cfg.agreement_budget < 1 and cfg.uncertainty == "divergence",
        "contrast's negative": bool(cfg.w_contrast),
        "ceiling at a quantile": bool(cfg.clip_quantile and cfg.w_div),
    }
    return {name: float(n) for name, n in passes.items() if n}


def flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """What a square matrix product reaches here, floating-point operations per second."""
    from torch.utils.benchmark import Timer  # every run imports this file, and few ask for this

    n = 4096 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())  # warms up, and waits for a GPU
    return 2 * n**3 / timer.blocked_autorange(min_run_time=0.3).median


def describe(cfg: Config) -> str:
    """The whole plan as text."""
    device, dtype, reason = choose_device(cfg.device, cfg.dtype)
    data, prompt = f"data {cfg.data}", 40 if cfg.data == "tiny" else 300  # tokens, a mean over student, teacher and contexts
    if jsonl.is_file(cfg.data):  # it is on this disk, so its mistakes can be named now
        sizes = dict(train_size=cfg.train_size, test_size=cfg.eval_size)
        task, manifest = jsonl.load_jsonl(cfg.data, **sizes, seed=cfg.seed, negatives=False)
        data, letters = jsonl.in_short(manifest), sum(len(e.question + e.reference) for e in task.train)
        prompt = 40 + letters / len(task.train) / 4  # a token has about four letters
        cfg.steps = steps_of(cfg, manifest["train"])
    steps, found = cfg.steps or f"as many as {cfg.epochs:g} epoch{'s' * (cfg.epochs != 1)} of {cfg.data} need", passes_of(cfg)
    lines = [
        f"{cfg.recipe} on {SHORT.get(cfg.model, cfg.model)}, {data}",
        reason,
        f"steps: {steps}, each of {cfg.batch} prompts in micro-batches of {cfg.micro_batch}",
        f"passes per step: sampling up to {cfg.max_new_tokens} tokens; " + ", ".join(f"{n:g} {k}" for k, n in found.items()),
    ]
    if cfg.uses_average:
        updates = f"{cfg.steps // cfg.ema_every} updates, " if cfg.steps else ""
        lines.append(f"EMA teacher: {updates}after {half_life(cfg.ema_decay, cfg.ema_every):.0f} steps half of it is new")
    size = size_of(cfg.model)
    if size is None:
        return "\n".join([*lines, "memory and time: unknown until the model is downloaded (give a folder or a short name)"])
    parameters, needed = size[0], memory(cfg, *size, dtype != "fp32", parallel.size(), device.type == "cuda")
    lines.append(f"memory: about {needed / 2**30:.1f} GiB, of {parameters / 1e6:.0f} M parameters")
    speed = flops_per_second(device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32))
    prompt, answer = min(cfg.max_prompt_tokens, prompt), cfg.max_new_tokens / 4
    passes = sum(found.values()) - 1 + (4 if cfg.grad_checkpointing else 3)  # read, trained
    tokens = cfg.batch * ((prompt + answer) * passes / REACHED + cfg.on_policy * answer / SAMPLING)
    seconds = 2 * parameters * tokens / speed / parallel.size()
    in_all = f", {duration(cfg.steps * seconds)} in all" if cfg.steps else ""
    lines.append(f"time on this device: very roughly {duration(seconds)} a step{in_all}")
    lengths = f"  for prompts of {prompt:.0f} tokens and answers of {answer:.0f}, a quarter of --max-new-tokens"
    lines.append(f"{lengths} {cfg.max_new_tokens}: the flag that matters most, since an answer may go on that long")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """0.31 -> "0.3 s", 300 -> "5.0 min", 10390 -> "2.9 h"."""
    unit, size = ("s", 1) if seconds < 120 else ("min", 60) if seconds < 7200 else ("h", 3600)
    return f"{seconds / size:.1f} {unit}"


def memory(cfg: Config, parameters: float, layers: int, hidden: int, vocab: int, bf16=False, processes=1, cuda=False) -> float:
    """Bytes on the device at the peak of the update, roughly: the formula at the top of the file."""
    # LoRA on the seven projections of a layer: about rank * 2 * (4 H + 3 * 3 H) parameters.
    trained = layers * cfg.lora_rank * 26 * hidden if cfg.lora_rank else parameters
    averages = cfg.uses_average + (cfg.uses_base and not cfg.lora_rank)  # with LoRA the base is the model itself
    tokens = cfg.micro_batch * (min(cfg.max_prompt_tokens, 512) + cfg.max_new_tokens)
    # Bytes kept per token, layer and hidden unit for the backward; under autocast some stay fp32.
    kept = 4 if cfg.grad_checkpointing else 68 if bf16 else 96
    answers = cfg.micro_batch * cfg.max_new_tokens
    chunk, side, piece = (min(n, answers) for n in tokens_per_chunk(cfg.chunk, vocab, cuda))
    inside = 4 if not cfg.uses_teacher else 12 if cfg.divergence == "jsd" else 6  # tensors of (piece, V)
    head = 4 * vocab * (chunk + cfg.uses_teacher * side + inside * piece)
    held = (2 if bf16 and cfg.lora_rank else 4) * parameters + (12 + 4 * averages) * trained
    if cfg.shard:  # and, while answers are sampled and read, the layers once more, whole
        held = held / processes + (2 if bf16 else 4) * parameters
    return held + tokens * layers * hidden * kept + head
