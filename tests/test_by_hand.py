"""docs/by-hand.md shows what each core file prints when it is run; a second calculation checks the numbers.

Files are found in the page: a new one needs its two fenced blocks there, and nothing in this file.
After an edit of an example, `python tests/test_by_hand.py` puts the outputs of the page right.
"""

import math
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import in_process

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "by-hand.md"
BLOCK = re.compile(r"```bash\npython (\w+\.py)\n```\n\n```text\n(.+?)\n```", re.DOTALL)
SHOWN = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))
NUMBER = r"-?\d+(?:\.\d+)?"
each = pytest.mark.parametrize("file", SHOWN)


@cache
def printed(file):
    """unisd.py by a Python of its own, the others by this one: three processes less that import torch."""
    if file != "unisd.py":
        code, out, err = in_process(ROOT, file)
        assert code == 0 and not err, err
        return out.strip()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}  # a console that knows ASCII only
    done = subprocess.run([sys.executable, file], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.strip()


def numbers(file, start, lines=1):
    """The numbers behind the words `start`, in the line that starts with them and those that follow it."""
    rows = printed(file).splitlines()
    (first,) = (i for i, row in enumerate(rows) if row.startswith(start))
    text = " ".join([rows[first].removeprefix(start), *rows[first + 1 : first + lines]])
    return [float(number) for number in re.findall(NUMBER, text)]


def close(shown, calculated, digits):
    assert shown == pytest.approx(calculated, abs=0.51 * 10**-digits), (shown, calculated)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_every_file_once():
    text = PAGE.read_text(encoding="utf-8")
    assert {"losses.py", "agreement.py", "ema.py"} <= set(SHOWN)
    assert len(SHOWN) == text.count("```bash\n") == text.count("```text\n")  # no block escapes the pattern
    for file in SHOWN:
        assert f"## {file}\n" in text


@each
def test_it_prints_what_the_page_shows(file):
    """Equal texts, numbers equal up to 2 in the last digit shown: other processors round differently."""
    got, shown = printed(file), SHOWN[file]
    assert re.sub(NUMBER, "#", got) == re.sub(NUMBER, "#", shown), got
    for a, b in zip(re.findall(NUMBER, got), re.findall(NUMBER, shown), strict=True):
        unit = 10 ** -len(b.partition(".")[2]) if "." in b else 0
        assert abs(float(a) - float(b)) <= 2.1 * unit, f"{a} is {b} in docs/by-hand.md"


@each
def test_it_is_short_plain_and_says_what_to_notice(file):
    assert printed(file).isascii()
    rows = printed(file).splitlines()
    assert len(rows) <= 30 and max(map(len, rows)) <= 120
    assert any(row.startswith("Notice: ") for row in rows)


# --- losses.py -------------------------------------------------------------------------------------------------------

ROWS = {  # (student, teacher)
    "1 they agree": ((0.7, 0.1, 0.1, 0.1), (0.7, 0.1, 0.1, 0.1)),
    "2 no idea": ((0.25, 0.25, 0.25, 0.25), (0.7, 0.2, 0.05, 0.05)),
    "3 sure, wrong": ((0.97, 0.01, 0.01, 0.01), (0.1, 0.8, 0.05, 0.05)),
}


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("name", ROWS)
def test_every_divergence_of_the_three_tokens(name):
    p, q = ROWS[name]
    row = numbers("losses.py", name, lines=2)
    assert (tuple(row[:4]), tuple(row[4:8])) == (p, q)
    mean, best = [(a + b) / 2 for a, b in zip(p, q, strict=True)], q.index(max(q))
    top = kl((q[best], 1 - q[best]), (p[best], 1 - p[best]))
    for shown, calculated in zip(
        row[8:], [kl(q, p), kl(p, q), (kl(q, mean) + kl(p, mean)) / 2, top, math.log(p[0] / q[0])], strict=True
    ):
        close(shown, calculated, 3)


def test_every_push_on_the_logits_by_finite_differences():
    p, q = ROWS["3 sure, wrong"]

    def softmax(logits):
        return [math.exp(x) / sum(map(math.exp, logits)) for x in logits]

    def jsd(s):
        mean = [(a + b) / 2 for a, b in zip(s, q, strict=True)]
        return (kl(q, mean) + kl(s, mean)) / 2

    cases = {
        "forward KL  ": lambda s: kl(q, s),
        "reverse KL  ": lambda s: kl(s, q),
        "JSD  ": jsd,
        "forward KL clipped at 2": lambda s: min(kl(q, s), 2.0),
    }
    for name, loss in cases.items():
        shown = numbers("losses.py", name)[:4]
        for v in range(4):
            up, down = ([math.log(a) + step * (i == v) for i, a in enumerate(p)] for step in (1e-5, -1e-5))
            close(shown[v], -(loss(softmax(up)) - loss(softmax(down))) / 2e-5, 2)


def test_every_row_of_the_contrast():
    rows = [row for row in printed("losses.py").splitlines() if re.fullmatch(rf"( +{NUMBER}){{7}}   [a-z ]+", row)]
    assert len(rows) == 3
    for row in rows:
        student, right, wrong, d_right, d_wrong, loss, push = map(float, re.findall(NUMBER, row))
        close(d_right, abs(student - right), 1), close(d_wrong, abs(student - wrong), 1)
        close(loss, max(0.0, 0.5 + d_right - d_wrong), 1)
        assert push == (loss > 0) * (math.copysign(1, wrong - student) * -1 - math.copysign(1, student - right))
    assert "dead zone" in rows[1] and loss == 0


# --- agreement.py ----------------------------------------------------------------------------------------------------


def test_readings_to_disagreement_to_weight():
    contexts = [numbers("agreement.py", f"context {k}") for k in (1, 2, 3)]
    variances, unit = numbers("agreement.py", "variance"), [1.0, 0.01]
    for t in range(6):  # five tokens and their mean
        readings = [row[t] for row in contexts]
        center = sum(readings) / 3
        close(variances[t], sum((r - center) ** 2 for r in readings) / (2 if t < 5 else 3), 2)
    for row in contexts:
        close(row[5], sum(row[:5]) / 5, 2)
    ordered = sorted(variances[:5])
    q = ordered[3] + 0.8 * (ordered[4] - ordered[3])  # .95 of the way from the first to the fifth is 3.8
    rows = [row for row in printed("agreement.py").splitlines() if row.startswith("weight ")]
    for row, gamma in zip(rows, unit, strict=True):
        *weights, of_sequence, shown = map(float, re.findall(NUMBER, row))
        assert shown == gamma
        close(of_sequence, math.exp(-gamma * variances[5]), 3)
        for weight, variance in zip(weights, variances[:5], strict=True):
            close(weight, 1 / (1 + gamma * variance / q), 3)


def test_the_weight_that_cancels():
    batch, sequence = (numbers("agreement.py", f"normalizer {name}")[:3] for name in ("batch", "sequence"))
    for i, w in enumerate(numbers("agreement.py", "w    ")):
        close(batch[i], (1 + 1 + 3 * w + 3 * w) / (1 + 1 + w + w), 2)
        close(sequence[i], ((1 + 1) / 2 + (3 * w + 3 * w) / max(w + w, 1)) / 2, 2)
    assert sequence[0] == sequence[1] > sequence[2]
    for shown, w in zip(numbers("agreement.py", "Gradient of")[1:], [1, 1, 0.5, 0.5], strict=True):
        close(shown, w / 3, 2)


# --- ema.py ----------------------------------------------------------------------------------------------------------


def test_ten_steps_of_an_average_and_its_half_life():
    steps, fp32, bf16 = (numbers("ema.py", name) for name in ("n  ", "fp32", "bf16"))
    assert steps == [*range(11), 1000] and bf16 == [1.0] * 12
    average, by_step = 1.0, [1.0]
    for _ in range(1000):
        average = 0.9 * average + 0.1 * 1.02
        by_step.append(average)
    for n, shown in zip(steps, fp32, strict=True):
        close(shown, by_step[int(n)], 4)
    assert fp32[6] < 1.01 < fp32[7]
    half_lives = [line for line in printed("ema.py").splitlines() if line.startswith("decay")]
    for line in half_lives:
        decay, every, shown = map(float, re.findall(NUMBER, line))
        assert decay ** (shown / every) == pytest.approx(0.5, abs=0.01)
    assert len(half_lives) == 3
    assert numbers("ema.py", "1.0200") == [1.05] and "(True)" in printed("ema.py")


if __name__ == "__main__":
    fresh = lambda match: f"```bash\npython {match[1]}\n```\n\n```text\n{printed(match[1])}\n```"
    PAGE.write_text(BLOCK.sub(fresh, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
