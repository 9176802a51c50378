"""make.py - what the torch code computes, written down for those who port it.

What: evaluates every case of cases.py with the functions of reference.py, in float64, and writes inputs, settings, outputs
and gradients to the JSON files beside it. README.md explains their format.
Depends on torch, cases.py, reference.py.   Try it:  python tests/golden/make.py
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from cases import FILES, Case
from reference import FUNCTIONS


def evaluate(case: Case) -> tuple[dict, dict, dict]:
    """-> outputs, gradients of the sum of all outputs, intermediate values."""
    inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in case.inputs.items()}
    if case.function == "ema_update":  # one update per student
        shadows = [inputs["shadow"]]
        for student in inputs["students"]:
            shadows.append(FUNCTIONS["ema_update"](shadows[-1], student, **case.settings))
        return {"shadows": torch.stack(shadows[1:])}, {}, {}
    at = {k: inputs[k].requires_grad_() for k in case.gradients.split()}
    value, between = FUNCTIONS[case.function](*inputs.values(), **case.settings), {}
    if isinstance(value, dict):
        between = {k: v.detach() for k, v in value.items() if k != "loss"}
        value = {"loss": value["loss"]}
    elif isinstance(value, tuple):
        value = dict(zip(("student", "teacher"), value, strict=True))
    else:
        value = {"value": torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)}
    total, found = sum(v.sum() for v in value.values()), [None] * len(at)
    if at and total.requires_grad:
        found = torch.autograd.grad(total, list(at.values()), allow_unused=True)
    gradients = {k: torch.zeros_like(x) if g is None else g for (k, x), g in zip(at.items(), found, strict=True)}
    return {k: v.detach() for k, v in value.items()}, gradients, between


def record(case: Case) -> dict:
    """One entry of the JSON."""
    where = f"{case.function}, {case.name}"
    out = {"function": case.function, "case": case.name} | ({"note": case.note} if case.note else {})
    out["inputs"] = {k: None if v is None else array(v) for k, v in case.inputs.items()}
    out["settings"] = {k: plain(v) for k, v in case.settings.items()}
    try:
        outputs, gradients, between = evaluate(case)
    except ValueError as error:
        assert case.refuses and case.refuses in str(error), f"{where}: {error}"
        return out | {"outputs": {}, "gradients": {}, "raises": {"error": "ValueError", "names": case.refuses}}
    assert not case.refuses, f"{where}: nothing was raised"
    assert all(g.isfinite().all() for g in gradients.values()), f"{where}: a gradient is not finite"
    out["outputs"] = {k: array(v) for k, v in outputs.items()}
    # A plain 0 is zero everywhere; what is left of a difference of equal numbers is rounding, another on another machine.
    out["gradients"] = {k: array(g) if (g.abs() > 1e-14).any() else 0 for k, g in gradients.items()}
    return out | ({"intermediate": {k: array(v) for k, v in between.items()}} if between else {})


def array(x: Tensor) -> dict:
    kind = "float64" if x.is_floating_point() else "int64"
    assert x.dtype == getattr(torch, kind), x.dtype
    return {"shape": list(x.shape), "dtype": kind, "data": plain((x + 0).tolist())}  # + 0: no -0.0


def plain(x):
    """JSON has neither inf nor nan: they are the strings "inf", "-inf" and "nan"."""
    if isinstance(x, list):
        return [plain(y) for y in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def pretty(x, indent: int = 0) -> str:
    """JSON that reads well: what is short stays on one line, a row of numbers always does."""
    flat = json.dumps(x)
    row = isinstance(x, list) and not any(isinstance(y, list | dict) for y in x)
    if len(flat) + indent <= 100 or row or not isinstance(x, dict | list):
        return flat
    start, end = "{}" if isinstance(x, dict) else "[]"
    keys = [json.dumps(k) + ": " for k in x] if isinstance(x, dict) else [""] * len(x)
    values = x.values() if isinstance(x, dict) else x
    lines = [" " * (indent + 1) + k + pretty(v, indent + 1) for k, v in zip(keys, values, strict=True)]
    return start + "\n" + ",\n".join(lines) + "\n" + " " * indent + end


def build() -> dict[str, list[dict]]:
    """File name -> its entries."""
    return {name: [record(case) for case in cases()] for name, cases in FILES.items()}


def main() -> None:
    for name, entries in build().items():
        text = pretty(entries) + "\n"
        (Path(__file__).parent / name).write_text(text)
        print(f"{name}: {len(entries)} cases, {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
