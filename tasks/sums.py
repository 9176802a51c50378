"""sums.py - writes tasks/sums.jsonl, the example of a file of your own:  python -m tasks.sums

Two-digit sums and differences, each with a right and a wrong worked line. It exists because a real model of 135 M parameters gets
most of them wrong alone and nearly all right with the reference in its prompt: the smallest real world to teach itself in.

Standard library only.   Try it:  python train.py --model SmolLM2-135M --data tasks/sums.jsonl --dry-run
"""

import json
import random
from pathlib import Path

FILE, TRAIN, TEST = Path(__file__).with_name("sums.jsonl"), 600, 200


def lines(seed: int = 0) -> list[dict]:
    """TRAIN + TEST different questions, the last TEST of them held out."""
    rng, found = random.Random(seed), {}
    while len(found) < TRAIN + TEST:
        a, b, sign = rng.randint(10, 99), rng.randint(10, 99), rng.choice("+-")
        a, b = (a, b) if sign == "+" else (max(a, b), min(a, b))
        answer = a + b if sign == "+" else a - b
        slip = rng.choice([d for d in (-11, -10, -1, 1, 10, 11) if answer + d >= 0])  # a lost carry, or one off
        line = {"question": f"What is {a} {sign} {b}?", "reference": f"{a} {sign} {b} = {answer}", "answer": answer}
        found[line["question"]] = line | {"negative": f"{a} {sign} {b} = {answer + slip}"}
    return [line | {"split": "train" if i < TRAIN else "test"} for i, line in enumerate(found.values())]


if __name__ == "__main__":
    FILE.write_text("".join(json.dumps(line) + "\n" for line in lines()), encoding="utf-8")
    print(f"{TRAIN} + {TEST} questions -> {FILE}")
