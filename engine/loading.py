"""loading.py - a model that is ready to answer, or one line that says why it cannot serve.

It exists because nearly everything that can be wrong with a model can be seen before the first token: weights that are not
all there (pretrained.py), no chat template, nothing that ends an answer, logits that are not its head's. What is found here
costs no work, and every command that loads a model finds it.

Depends on torch, pretrained.py, head.py, sampling.py, data.py.   Try it:  python -m pytest tests/test_loading.py -q
"""

import re
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.head import check_head
from engine.parallel import ALONE, Alone
from engine.pretrained import SHORT, pieces, the_peft
from engine.sampling import check_company
from tasks.data import chat_ids, opened_tag, render


def choose_device(device: str, dtype: str) -> tuple[torch.device, str, str]:
    """Device and matmul precision, once. -> (device, "fp32", "bf16" or "fp16", one line with the reasons).

    auto takes a CUDA device where there is one, and else the CPU. fp16 is chosen only for a CUDA card without bf16 (a T4).
    Apple's GPU (mps) must be asked for: it has not been measured.
    Raises ValueError if the device that was asked for is not there.
    """
    device_reason = dtype_reason = "given"
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device, device_reason = ("cuda", "a CUDA device is there") if cards else ("cpu", "no CUDA device is there")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device} does not exist; use auto, cpu, cuda, cuda:1 or mps") from error
    if target.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {device} is not supported; use auto, cpu, cuda, cuda:1 or mps")
    if target.type == "cuda" and (target.index or 0) >= cards:
        raise ValueError(f"--device {device}: no such CUDA device; there are {cards}; use cpu or auto")
    if target.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {device}: this machine or this build of torch has no Apple GPU; use cpu or auto")
    hardware = torch.cuda.get_device_name(target) if target.type == "cuda" else target.type
    if dtype == "auto":
        dtype, dtype_reason = "fp32", "bf16 would not be faster here"
        if target.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            dtype, dtype_reason = "bf16", "weights stay fp32"
        elif target.type == "cuda" and torch.cuda.get_device_capability(target) >= (7, 0):  # fp16 tensor cores
            dtype, dtype_reason = "fp16", "weights stay fp32; this card has no bf16"
    device_reason += "; not measured" * (target.type == "mps")
    return target, dtype, f"device {target} ({hardware}: {device_reason}) | matmul {dtype} ({dtype_reason})"


@dataclass
class Loaded:
    """A model that is ready to answer. `vocab`, the tokenizer's size: embeddings beyond it are padding, never answers."""

    model: nn.Module
    tokenizer: object
    eos: list[int]
    vocab: int
    name: str  # the resolved hub id or folder
    adapter: nn.Module | None = None  # peft's wrapper around `model` where LoRA factors are trained
    dtype: str = "fp32"  # matmul precision, "fp32", "bf16" or "fp16"; the weights themselves stay what they are
    sample_batch: int = 256  # prompts answered together
    ranks: Alone = ALONE  # the processes that share the answering

    def autocast(self):
        """Matmuls in bf16 or fp16 on fp32 weights, where chosen. Leave it before weights are swapped: it caches casts."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.dtype)
        return torch.autocast(self.device.type, dtype=half, enabled=half is not None)

    def add_lora(self, rank: int, alpha: int, dropout: float) -> None:
        """Freeze the weights, train LoRA factors beside every linear layer of the decoder's blocks, whatever its name, and name the
        matrices that stay without. ValueError without peft, and where it cannot adapt this model.
        """
        peft = the_peft("--lora-rank above 0")
        decoder = {id(m) for m in self.model.get_decoder().modules()}  # not the vision tower of a multimodal model
        targets = [n for n, m in self.model.named_modules() if id(m) in decoder and isinstance(m, nn.Linear | Conv1D)]
        if not targets:
            raise ValueError(f"--lora-rank: {self.name} has no linear layer in its decoder; use --lora-rank 0")
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
        try:  # this puts the factors into `model`, which stays what everyone reads
            self.adapter = peft.get_peft_model(self.model, config)
        except ValueError as error:
            raise ValueError(f"--lora-rank: peft cannot adapt {self.name} ({error}); use --lora-rank 0") from error
        tables = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        rest = [n for n, p in self.model.get_decoder().named_parameters() if p.dim() > 1 and id(p) not in tables]
        rest = {re.sub(r"\.\d+\.", ".*.", n): 0 for n in rest if not re.search("lora_|base_layer", n)}
        if rest:
            warnings.warn(f"--lora-rank leaves {', '.join(rest)} as they are, no linear layers; 0 trains all", stacklevel=2)

    def merge(self) -> None:
        """Make a loaded adapter part of the weights: what is trained next starts there, and so does "the base"."""
        if self.adapter:
            self.model, self.adapter = self.adapter.merge_and_unload().requires_grad_(True), None  # peft had frozen it

    def train_text_only(self) -> None:
        """Freeze what no text gives a gradient (a vision tower): it would only cost memory in optimizer and averages."""
        used = {id(p) for m in (self.model.get_decoder(), self.model.get_output_embeddings()) for p in m.parameters()}
        for p in self.model.parameters():
            p.requires_grad_(p.requires_grad and id(p) in used)

    def save(self, folder, weights: dict | None = None) -> None:
        """The model, or its adapter, and the tokenizer, as a Hugging Face folder; `weights` where its own are sharded."""
        kept = {"save_embedding_layers": False} if self.adapter else {}  # else peft would look whether they have changed
        (self.adapter or self.model).save_pretrained(folder, state_dict=weights, **kept)
        self.tokenizer.save_pretrained(folder)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def context(self) -> int:
        """The longest sequence the model takes, and reads the same in any company."""
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        # LongRoPE reads a whole batch in another way as soon as one row is longer than this. (Dynamic NTK: than the context.)
        long = [r for r in (rope, *rope.values()) if isinstance(r, dict) and r.get("rope_type") == "longrope"]
        return min([config.max_position_embeddings, *(r["original_max_position_embeddings"] for r in long)])


def end_ids(model: nn.Module, tokenizer) -> list[int]:
    """Every id that ends an answer: the tokenizer's and all of the generation config's."""
    ids = []
    for source in (getattr(model, "generation_config", None), tokenizer):
        found = getattr(source, "eos_token_id", None)
        ids += found if isinstance(found, list) else [] if found is None else [found]
    return list(dict.fromkeys(ids))


def load(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Loaded:
    """A short name, a hub id or a folder -> a model ready to answer. Raises ValueError with the fix if it cannot serve."""
    source = SHORT.get(name, name)
    tokenizer, model, adapter = pieces(name, source, dtype)
    eos, vocab = end_ids(model, tokenizer), max(tokenizer.get_vocab().values()) + 1  # ids may have holes: the largest counts
    rows = len(model.get_input_embeddings().weight)
    if len(tokenizer.get_vocab()) == len(tokenizer.added_tokens_decoder):  # transformers goes on without the vocabulary's file
        raise ValueError(f"--model {name}: its tokenizer knows no words; copy tokenizer.json, or what else its vocabulary is in")
    if not tokenizer.chat_template:
        raise ValueError(f"--model {name}: its tokenizer has no chat template; use an instruct model, or save it with one")
    if rows < vocab:
        raise ValueError(f"--model {name}: {rows} embeddings but ids up to {vocab - 1}; model.resize_token_embeddings({vocab})")
    if not eos:
        raise ValueError(f"--model {name}: no end-of-text id in its tokenizer or generation config; set eos_token_id")
    if strange := [i for i in eos if not 0 <= i < vocab]:
        fix = "set eos_token_id in generation_config.json"
        raise ValueError(f"--model {name}: its end-of-text id {strange[0]} is no token, ids go from 0 to {vocab - 1}; {fix}")
    try:
        tag = opened_tag(tokenizer)
    except Exception as error:  # a template's code may raise anything
        raise ValueError(f"--model {name}: its chat template fails ({' '.join(str(error).split())}); repair it") from error
    if tag:
        told = f"--model {name}: its chat template opens {tag} even with thinking off: every answer begins with thinking"
        warnings.warn(f"{told}; raise --max-new-tokens, edit the template, or use another model", stacklevel=2)
    for m in model.modules():
        if isinstance(m, nn.Embedding):
            m.padding_idx = None  # that token's embedding would never learn, and it may be the end of text
    lm = Loaded(model.to(device), tokenizer, eos, vocab, source, adapter)
    try_out(lm, name)
    return lm


def try_out(lm: Loaded, name: str) -> None:
    """Read and answer one short prompt. Raises ValueError if this architecture cannot do all that a run will ask of it."""
    try:
        prompt = chat_ids(lm.tokenizer, "1 + 1")
        check_head(lm.model, lm.vocab, prompt)
        check_company(lm.model, prompt)
        if not (longest := getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)):
            raise ValueError("its config has no max_position_embeddings, the longest text it takes")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each kind of model fails in its own way
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--model {name}: {type(lm.model).__name__} is not supported: {why}; use another model") from error
    if lm.context < longest:
        why = f"beyond {lm.context} tokens (of {longest}) its LongRoPE reads a row by the longest one beside it"
        warnings.warn(f"--model {name}: {why}, so prompt and answer are held to {lm.context}", stacklevel=3)


def load_base(name: str, device: torch.device, lm: Loaded) -> Loaded:
    """`load` for a --base that `lm` is compared with. Raises ValueError if it cannot serve, or has other tokens or prompts."""
    try:
        base = load(name, device)
    except ValueError as error:
        raise ValueError(str(error).replace("--model", "--base", 1)) from error
    same_language(lm, base)
    return base


def same_language(lm: Loaded, base: Loaded) -> None:
    """Raises ValueError unless the same ids mean the same to both, and the same question is the same prompt."""
    chat = lambda x: (chat_ids(x.tokenizer, "x"), render(x.tokenizer, "x", "y"))
    for what, of in (("tokenizer", lambda x: (x.vocab, x.tokenizer.get_vocab())), ("chat template", chat)):
        if of(lm) != of(base):
            raise ValueError(f"--base {base.name} has another {what} than --model {lm.name}: give its true base")
