"""check.py - does a port compute what the vectors say?

    python tests/golden/check.py losses:forward_kl            one function of a module
    python tests/golden/check.py port:my_kl=forward_kl        a function under another name
    python tests/golden/check.py port                         every function of a module that a vector is named after
    python tests/golden/check.py port --case "micro-batch"    only cases whose name matches a regular expression

What: calls the port on every case, compares values, and gradients: autograd of torch, vjp of JAX, central differences of
NumPy. Prints a line per function with the number of cases and the worst error, or with the first number that is wrong, in the
order of porting: so repair the first FAIL first. A port that changes its inputs fails, too. The
error of a number is |got - expected| / max(0.1, |expected|). Modules are looked for in the current folder first. README.md has the
signatures. Exit code 0: all agree; 1: something differs; 2: the command makes no sense.
Depends on numpy, and on whatever the port needs; not on the rest of the repository.
"""

import argparse
import difflib
import importlib
import inspect
import json
import re
import sys
import traceback
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ORDER = ("losses", "agreement", "ema", "reading", "objective")  # of porting, and of printing: each needs only those before it
TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 0.15}  # README.md says how they were found
ONLY_FIRST = ("objective",)  # functions of which only the first output is demanded
STEP, DIFFERENCES = 1e-5, 1e-6  # of central differences, and the tolerance of a gradient found by them


class Mismatch(Exception):
    """The port and a vector disagree; the message says where."""


def load() -> dict[str, list[dict]]:
    """All vectors beside this file: function -> its cases, in the order of porting."""
    found: dict[str, list[dict]] = {}
    for name in ORDER:
        for case in json.loads((HERE / f"{name}.json").read_text()):
            found.setdefault(case["function"], []).append(case)
    return found


def decode(array: dict | None) -> np.ndarray | None:
    """{"shape", "dtype", "data"} -> an array; the strings "inf", "-inf" and "nan" become numbers."""
    if array is None:
        return None
    return np.array(array["data"], dtype=object).astype(array["dtype"]).reshape(array["shape"])


def setting(x):
    return float(x) if x in ("inf", "-inf") else x


# --- kinds of arrays --------------------------------------------------------------------------------------------------


class Numpy:
    by_differences = True  # so: no gradient in float32, none where a value depends on what is held constant, none at a kink

    def __init__(self, dtype: str):
        self.dtype = dtype
        if dtype == "bfloat16":
            raise ValueError("numpy has no bfloat16; use --dtype float32 or float64")

    def give(self, x: np.ndarray):
        return x.astype(self.dtype) if x.dtype.kind == "f" else x

    def take(self, x) -> np.ndarray:
        return np.asarray(x, dtype=np.float64)

    def call(self, port, inputs: list, settings: dict, at: list[int]) -> tuple:
        """-> (what the port returned, its gradients with respect to the inputs numbered `at`, or None)."""
        value = port(*inputs, **settings)
        return value, [self.slopes(port, inputs, settings, i) for i in at] if self.dtype == "float64" else None

    def slopes(self, port, inputs: list, settings: dict, at: int) -> np.ndarray:
        """The derivative of the sum of all outputs by each number of one input; nan at a kink, where it has two, and at inf."""
        found = np.full_like(inputs[at], np.nan)

        def moved(where, step):
            some = [x.copy() if i == at else x for i, x in enumerate(inputs)]
            some[at][where] += step
            return [self.take(x) for x in parts(port(*some, **settings))]

        for where in np.argwhere(np.isfinite(inputs[at])).tolist():
            where = tuple(where)
            low, middle, high = (moved(where, step) for step in (-STEP, 0, STEP))
            with np.errstate(invalid="ignore"):  # inf - inf is no change; and first the difference, then the sum: -1e30 is large
                change = [
                    sum(np.where(x == y, 0.0, y - x).sum() for x, y in zip(*pair, strict=True))
                    for pair in ((low, middle), (middle, high))
                ]
            bent = abs(change[1] - change[0]) > 1e-2 * STEP * (1 + abs(change[1]) / STEP)
            found[where] = np.nan if bent else sum(change) / (2 * STEP)
        return found


class Torch(Numpy):
    by_differences = False

    def __init__(self, dtype: str):
        import torch

        self.torch, self.dtype = torch, getattr(torch, dtype)

    def give(self, x: np.ndarray):
        return self.torch.tensor(x, dtype=self.dtype if x.dtype.kind == "f" else None)

    def take(self, x) -> np.ndarray:
        return x.detach().double().cpu().numpy() if isinstance(x, self.torch.Tensor) else np.asarray(x, dtype=np.float64)

    def call(self, port, inputs: list, settings: dict, at: list[int]) -> tuple:
        inputs = [x.requires_grad_() if i in at else x for i, x in enumerate(inputs)]
        value, found = port(*inputs, **settings), [None] * len(at)
        total = sum(self.torch.as_tensor(x).sum() for x in parts(value)) if at else None
        if at and total.requires_grad:
            found = self.torch.autograd.grad(total, [inputs[i] for i in at], allow_unused=True)
        return value, [self.torch.zeros_like(inputs[i]) if g is None else g for i, g in zip(at, found, strict=True)]


class Jax(Numpy):
    by_differences = False

    def __init__(self, dtype: str):
        import jax

        if dtype == "float64":
            jax.config.update("jax_enable_x64", True)  # else JAX makes float32 of everything, silently
        self.jax, self.dtype = jax, dtype

    def give(self, x: np.ndarray):
        return self.jax.numpy.asarray(x, dtype=self.dtype if x.dtype.kind == "f" else None)

    def call(self, port, inputs: list, settings: dict, at: list[int]) -> tuple:
        def run(*some):
            all_inputs = list(inputs)
            for i, x in zip(at, some, strict=True):
                all_inputs[i] = x
            value = port(*all_inputs, **settings)
            return sum(self.jax.numpy.sum(x) for x in parts(value)), value

        if not at:
            return port(*inputs, **settings), []
        total, back, value = self.jax.vjp(run, *[inputs[i] for i in at], has_aux=True)
        return value, list(back(self.jax.numpy.ones_like(total)))


KINDS = {"numpy": Numpy, "torch": Torch, "jax": Jax}


def kind_of(port, module) -> str:
    """What the port computes with, by what its module has imported: jax before torch before numpy."""
    home = sys.modules.get(getattr(port, "__module__", ""), module)
    names = [getattr(v, "__name__" if inspect.ismodule(v) else "__module__", None) for v in vars(home).values()]
    roots = {n.split(".")[0] for n in names if isinstance(n, str)}
    return "jax" if "jax" in roots else "torch" if "torch" in roots else "numpy"


def parts(value) -> list:
    """The outputs of a port: one array, a tuple in the order of the vectors, or a dict, of which the first counts."""
    if isinstance(value, dict):
        return [next(iter(value.values()))]
    return list(value) if isinstance(value, tuple | list) else [value]


# --- one case, one function -------------------------------------------------------------------------------------------


def compare(what: str, got: np.ndarray, expected: np.ndarray, tolerance: float) -> float:
    """The worst error; Mismatch names the first number that is off."""
    if got.shape != expected.shape:
        raise Mismatch(f"{what} has shape {got.shape}, expected {expected.shape}")
    with np.errstate(invalid="ignore"):
        error = np.abs(got - expected) / np.maximum(0.1, np.abs(expected))
    special = ~np.isfinite(expected)  # inf and nan must be there, and nowhere else
    error = np.where(special | (got == expected), 0.0, error)
    same = np.where(special, (got == expected) | (np.isnan(got) & np.isnan(expected)), error <= tolerance)
    if not same.all():
        at = tuple(int(i) for i in np.argwhere(~same)[0])
        place = f" at {list(at)}" if at else ""
        raise Mismatch(f"{what}{place}: expected {expected[at]:.10g}, got {got[at]:.10g} ({(~same).sum()} of {same.size} differ)")
    return float(error.max(initial=0.0))


def outputs_of(case: dict, value) -> dict:
    """Name what the port returned as the vector names it."""
    names = list(case["outputs"])
    if isinstance(value, dict):
        known = case["outputs"] | case.get("intermediate", {})
        if names[0] not in value:
            raise Mismatch(f"the returned dict has no {names[0]!r}, only {', '.join(map(repr, value))}")
        return {k: v for k, v in value.items() if k in known}
    values = parts(value)
    if len(values) != len(names) and not (case["function"] in ONLY_FIRST and values):
        raise Mismatch(f"{len(values)} outputs, expected {len(names)}: {', '.join(names)}")
    return dict(zip(names, values, strict=False))


def check_case(port, case: dict, kind, tolerance: float, gradients: bool) -> tuple[float, float | None]:
    """-> worst error of the values, and of the gradients (None where none were compared)."""
    inputs = [None if x is None else kind.give(decode(x)) for x in case["inputs"].values()]
    settings = {k: setting(v) for k, v in case["settings"].items()}
    names = list(case["inputs"])
    wanted = case["gradients"] if gradients else {}
    if kind.by_differences:
        wanted = {k: g for k, g in wanted.items() if g != 0 and not held(case)}
    at = [names.index(k) for k in wanted]
    before = [None if x is None else np.array(kind.take(x)) for x in inputs]  # a copy
    if case["function"] == "ema_update":  # one update per student
        port = repeated(port, kind)
    try:
        value, found = kind.call(port, inputs, settings, at)
    except Exception as error:
        refused = {c.__name__ for c in type(error).__mro__}
        if "raises" not in case:
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise Mismatch(f"{type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno})") from error
        if case["raises"]["error"] not in refused or case["raises"]["names"] not in str(error):
            want = f"a {case['raises']['error']} that names {case['raises']['names']!r}"
            raise Mismatch(f"expected {want}, got {type(error).__name__}: {error}") from error
        return 0.0, None
    if "raises" in case:
        raise Mismatch(f"expected a {case['raises']['error']} that names {case['raises']['names']!r}, nothing was raised")
    for name, x, old in zip(names, inputs, before, strict=True):  # the caller reads them again
        if x is not None and not np.array_equal(kind.take(x), old, equal_nan=True):
            raise Mismatch(f"the input {name} was changed in place")
    known, worst, wrong = case["outputs"] | case.get("intermediate", {}), 0.0, []
    for name, x in outputs_of(case, value).items():  # all of them: what else is off tells where it began
        try:
            worst = max(worst, compare(name, kind.take(x), decode(known[name]), tolerance))
        except Mismatch as difference:
            wrong.append(str(difference))
    if wrong:
        raise Mismatch("; ".join(wrong))
    if found is None or not wanted:
        return worst, None
    steepest = 0.0
    for (name, expected), g in zip(wanted.items(), found, strict=True):
        right = np.zeros(case["inputs"][name]["shape"]) if expected == 0 else decode(expected)
        got = np.zeros_like(right) if g is None else kind.take(g)
        if kind.by_differences:
            got, tolerance = np.where(np.isnan(got) & np.isfinite(right), right, got), max(tolerance, DIFFERENCES)
        steepest = max(steepest, compare(f"gradient of {name}", got, right, tolerance))
    return worst, steepest


def held(case: dict) -> bool:
    """Does the value depend on something whose gradient is stopped, so that differences of the value are another thing?"""
    s = case["settings"]
    return case["function"] == "sampled_reverse_kl" or s.get("estimator") == "sampled" or bool(s.get("clip_quantile"))


def repeated(port, kind):
    """ema_update(shadow, student, decay) applied to each student in turn, all shadows stacked."""
    if inspect.isclass(port):
        port = as_function(port)

    def run(shadow, students, **settings):
        out = []
        for student in students:
            shadow = port(shadow, student, **settings)
            out.append(kind.take(shadow))
        return np.stack(out)

    return run


def as_function(average_class):
    """A class like ema.EMA, which averages a torch module's parameters, as a function of two tensors."""
    from torch import nn

    def update(shadow, student, decay):
        model = nn.Module()
        model.w = nn.Parameter(shadow.clone())
        average = average_class(model, decay)
        model.w.data = student
        average.update(model)
        return average.shadow["w"]

    return update


def check_function(port, name: str, cases: list[dict], kind, tolerance: float, gradients: bool) -> str:
    """All cases of one function -> a line for the reader. Raises Mismatch with the first case that differs."""
    worst, steepest, compared, wrong = 0.0, 0.0, False, []
    for case in cases:
        try:
            value, gradient = check_case(port, case, kind, tolerance, gradients)
        except Exception as error:  # not a Mismatch: what came back is no array
            what = error if isinstance(error, Mismatch) else f"{type(error).__name__}: {error}"
            wrong.append(f"case {case['case']!r}: {what}")
            continue
        worst, compared = max(worst, value), compared or gradient is not None
        steepest = max(steepest, gradient or 0.0)
    many = f"{len(cases)} case{'s' * (len(cases) != 1)}"
    if wrong:
        raise Mismatch(f"{wrong[0]} [{len(wrong)} of {many} failed]")
    wanted = any(case["gradients"] for case in cases)
    rest = f", gradients {steepest:.1e}" if compared else ", gradients not compared" if wanted else ""
    return f"ok   {name}: {many}, worst error {worst:.1e}{rest}"


# --- the command line -------------------------------------------------------------------------------------------------


def targets(text: str, vectors: dict) -> list[tuple]:
    """module, module:function or module:function=vector -> [(port, name in the vectors, module)]. Raises ValueError."""
    place, _, rest = text.partition(":")
    try:
        module = importlib.import_module(place)
    except Exception as error:  # a syntax error of the port, too
        hint = "; give its name as in `import`, without .py or a path" if re.search(r"\.py$|[/\\]", place) else ""
        raise ValueError(f"module {place!r} cannot be imported: {type(error).__name__}: {error}{hint}") from error
    if not rest:
        found = [(getattr(module, name), name, module) for name in vectors if hasattr(module, name)]
        if not hasattr(module, "ema_update") and inspect.isclass(vars(module).get("EMA")):
            found.append((module.EMA, "ema_update", module))
        if not found:
            raise ValueError(f"{place} has no function named like a vector; there are {', '.join(vectors)}")
        if missing := vectors.keys() - {name for _, name, _ in found}:
            near = {name: difflib.get_close_matches(name, vars(module), 1, 0.8) for name in sorted(missing)}
            told = ", ".join(name + (f" (but {like[0]!r})" if like else "") for name, like in near.items())
            print(f"check.py: {place} has {len(found)} of {len(vectors)} functions; not there: {told}", file=sys.stderr)
        return found
    ours, _, name = rest.partition("=")
    if not hasattr(module, ours):
        raise ValueError(f"{place} has no {ours!r}")
    if (name or ours) not in vectors:
        raise ValueError(f"there is no vector {name or ours!r}; there are {', '.join(vectors)}")
    return [(getattr(module, ours), name or ours, module)]


def expression(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:  # argparse knows ValueErrors only
        raise argparse.ArgumentTypeError(f"--case {text!r} is no regular expression: {error}") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="check.py", description="Check a port against the golden vectors.")
    parser.add_argument("target", nargs="+", help="module, module:function, or module:function=name_of_the_vector")
    parser.add_argument("--dtype", default="float64", choices=tuple(TOLERANCE))
    parser.add_argument("--arrays", default="auto", choices=("auto", *KINDS), help="what the port takes (default: by its imports)")
    parser.add_argument("--case", default="", type=expression, help="only cases whose name matches this regular expression")
    parser.add_argument("--tolerance", type=float, help="instead of the README's for this dtype")
    parser.add_argument("--no-gradients", action="store_true", help="compare values only")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(Path.cwd()))
    vectors, failed = load(), 0
    try:
        vectors = {k: [c for c in cases if args.case.search(c["case"])] for k, cases in vectors.items()}
        todo = [t for text in args.target for t in targets(text, vectors) if vectors[t[1]]]
        if not todo:
            raise ValueError(f"no case matches --case {args.case.pattern!r}")
        todo.sort(key=lambda target: list(vectors).index(target[1]))
        names = [kind_of(port, module) if args.arrays == "auto" else args.arrays for port, _, module in todo]
        kinds = {name: KINDS[name](args.dtype) for name in set(names)}
    except (ValueError, ImportError) as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 2
    tolerance = TOLERANCE[args.dtype] if args.tolerance is None else args.tolerance
    for (port, name, _), kind in zip(todo, names, strict=True):
        try:
            print(check_function(port, name, vectors[name], kinds[kind], tolerance, not args.no_gradients))
        except Mismatch as difference:
            failed += 1
            print(f"FAIL {name}: {difference}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
