"""build.py - put a run together: device, model, data, teacher, optimizer, and the processes that share it.

`start` turns a Config into a Run, all that train.py's loop needs, and refuses what cannot work before anything long begins. Its
order matters: LoRA, sharding, the copies that teachers are made of, the optimizer; each holds on to the parameters that it finds.

Depends on most other files.   Try it:  python -m pytest tests/test_train.py -q
"""

import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ema import EMA, half_life
from engine import checkpoint, contexts, metrics, parallel, plan
from engine.config import DEPARTURES, Config, day
from engine.loading import Loaded, choose_device, load
from engine.parallel import ALONE, Alone, whole_layers
from tasks import catalog, jsonl
from tasks.data import Task


class AdapterOff:
    """The frozen teacher under LoRA costs no copy: the base is still there, one only has to switch the adapter off."""

    def __init__(self, adapter):
        self.adapter = adapter  # peft's wrapper around the model

    @contextmanager
    def applied_to(self, model):
        """`with off.applied_to(model):` the model is the base as it was. The same interface as ema.EMA's."""
        with self.adapter.disable_adapter():
            yield model


@dataclass
class Run:
    """Everything a step needs; saved and restored by checkpoint.py."""

    cfg: Config
    lm: Loaded
    task: Task
    optimizer: torch.optim.Optimizer
    average: EMA | None  # the EMA teacher
    frozen: EMA | AdapterOff | None  # the model as it was: an average that is never updated, or no adapter; not saved
    scaler: torch.amp.GradScaler  # scales the loss under fp16; elsewhere it is switched off and does nothing
    step: int = 0
    prompts: dict = field(default_factory=dict)  # example index -> its prompts' token ids, made once
    usable: list = field(default_factory=list)  # the training examples that fit; a step draws from these
    ranks: Alone = ALONE  # the processes that share each step

    @contextmanager
    def teacher(self):
        """`with run.teacher():` the model is the teacher."""
        if not self.cfg.uses_teacher:
            yield self.lm.model
            return
        shadow = {"ema": self.average, "frozen": self.frozen, "live": None}[self.cfg.teacher]
        with shadow.applied_to(self.lm.model) if shadow else nullcontext(), whole_layers(self.lm.model):
            yield self.lm.model

    def loss_scale(self) -> float:
        """What the loss is multiplied with before the backward: 65,536 at first under fp16, else 1."""
        return self.scaler.scale(torch.ones((), device=self.lm.device)).item()

    def may_overflow(self) -> bool:
        """Is an infinite gradient norm an ordinary overflow of fp16? Not once the scale has been halved below 1."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1


def task_of(cfg: Config) -> tuple[Task, dict]:
    """The data that a run asks for -> (Task, what was kept and dropped)."""
    at_hand = cfg.data == "tiny" or jsonl.is_file(cfg.data)
    # Where nothing is trained, a hub's training data is not even downloaded.
    sizes = dict(train_size=cfg.train_size if at_hand or cfg.steps or cfg.epochs else None, test_size=cfg.eval_size)
    tiny = dict(wrong_references=cfg.wrong_references, references=cfg.references) if cfg.data == "tiny" else {}
    return catalog.load_task(cfg.data, **sizes, **tiny, seed=cfg.seed)


def place(cfg: Config) -> tuple[torch.device, Alone]:
    """Where this process works and with whom. Raises ValueError if the settings do not suit the number of processes."""
    name = cfg.device
    if name in ("auto", "cuda") and torch.cuda.is_available() and parallel.size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # each process its own
    device, cfg.dtype, reason = choose_device(name, cfg.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # plain "cuda" has no index and would be refused
    ranks = parallel.ranks()
    print(f"{reason} | torch {torch.__version__} | seed {cfg.seed}" + (f" | {ranks.size} processes" * (ranks.size > 1)))
    if cfg.batch % ranks.size:
        raise ValueError(f"--batch {cfg.batch} must be a multiple of the number of processes ({ranks.size})")
    if cfg.shard and cfg.dtype == "fp16":
        raise ValueError("--shard with --dtype fp16 is not supported: use --dtype bf16 or fp32, or leave out --shard")
    if cfg.shard and ranks.size == 1:
        raise ValueError("--shard divides the model among processes: start it with torchrun --nproc-per-node 2 or more")
    return device, ranks


def assemble(cfg: Config, lm: Loaded, task: Task | None, ranks: Alone = ALONE) -> Run:
    """What is trained, what it is compared with, and what trains it: LoRA, shards, teachers, optimizer."""
    model = lm.model
    if cfg.lora_rank:
        lm.add_lora(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    if cfg.shard:
        parallel.shard(model, bf16=cfg.dtype == "bf16")
    frozen = (AdapterOff(lm.adapter) if lm.adapter else EMA(model, 1.0)) if cfg.uses_base else None
    average = EMA(model, cfg.ema_decay) if cfg.uses_average else None
    if cfg.grad_checkpointing:
        # The first is its name since transformers 5.23, where the second one warns.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    # Two groups under --shard: AdamW updates the tensors of a group together, and sharded ones only among themselves.
    groups = [[p for p in trained if isinstance(p, parallel.DTensor) == kind] for kind in (False, True)]
    groups = [{"params": g} for g in groups if g]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=lm.device.type == "cuda")
    scaler = torch.amp.GradScaler(lm.device.type, enabled=cfg.dtype == "fp16")
    return Run(cfg, lm, task, optimizer, average, frozen, scaler, ranks=ranks)


def start(cfg: Config, out: Path) -> Run:
    """Load everything and check that it can work. Raises ValueError, with the fix, if it cannot."""
    torch.manual_seed(cfg.seed)
    device, ranks = place(cfg)
    cfg.date = ranks.objects(day(cfg.date, str(out) if cfg.resume else ""))[0]  # one for all processes
    if cfg.preset == "official":
        print("official settings, except:\n  - " + "\n  - ".join(DEPARTURES))
    found = None
    if jsonl.is_file(cfg.data):  # before the model, which takes longer: in one's own file mistakes are likeliest
        found = task_of(cfg)
        print(jsonl.in_short(found[1]))
        if cfg.resume:
            checkpoint.check_data(out, found[1])
    # Under LoRA nothing of the base is trained: it may lie in bf16 or fp16. What is trained is always fp32.
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.dtype) if cfg.lora_rank else None
    lm = load(cfg.model, device, half or torch.float32)
    lm.merge()
    lm.dtype, lm.sample_batch, lm.ranks = cfg.dtype, cfg.sample_batch, ranks
    lm.train_text_only()
    lm.tokenizer.today = cfg.date
    task, manifest = found or task_of(cfg)
    metrics.warn_of_foreign_words(lm, task)
    model = lm.model
    room = lm.context - cfg.max_new_tokens
    if room < 16:
        raise ValueError(f"--max-new-tokens {cfg.max_new_tokens} leaves no room in the model's context of {lm.context}: lower it")
    cfg.max_prompt_tokens = min(cfg.max_prompt_tokens, room)
    task.test, task.ood = (metrics.that_fit(lm, side, cfg.max_new_tokens) for side in (task.test, task.ood))
    if not task.test:
        raise ValueError("no held-out question fits: lower --max-new-tokens, or give shorter ones")
    cfg.steps = plan.steps_of(cfg, len(task.train))
    if cfg.sft_target == "worked" and not all(e.demo for e in task.train):
        raise ValueError(f"--sft-target worked: {task.name} has no worked answers beside references; use --sft-target reference")
    data = f"data {task.name} ({len(task.train)} questions, {task.fingerprint()}) | {cfg.steps} steps of {cfg.batch}"
    print(f"model {lm.name} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters) | {data}")
    run = assemble(cfg, lm, task, ranks)
    checkpoint.room_for(out, sum(p.numel() for p in model.parameters() if p.requires_grad))
    if run.average:
        print(f"EMA teacher: after {half_life(cfg.ema_decay, cfg.ema_every):.0f} steps half of it is new")
    model.eval()
    if cfg.steps:
        with whole_layers(model):
            prepared = contexts.prepare(lm, task, cfg, out)
        run.prompts, notes = contexts.encode_all(lm.tokenizer, task, cfg, prepared)
        run.usable = list(run.prompts)
        manifest |= notes if manifest else {}
    if manifest:
        checkpoint.write_json(out / "manifest.json", manifest)
    if ranks.rank:  # from here on only dropout draws from torch's generator: not the same on every rank
        torch.manual_seed(cfg.seed + ranks.rank)
    return run
