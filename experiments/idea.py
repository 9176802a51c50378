"""idea.py - draws docs/figures/idea.png, the picture in the README:  python -m experiments.idea

What: one question of the tiny world, the untouched model's own answer to it, and four readings of that answer, each with
the place that it finds likeliest and its probability. tests/test_docs.py asks the model again and compares.
Depends on matplotlib only.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch
from PIL import Image

QUESTION = "where is toad: forest, castle, tower, harbor"
START, ANSWER = "the toad is in the", "harbor"  # the model's own answer, greedy, before training
DEMO = "example: where is hare: temple, barn, bridge, market\nanswer: the hare is in the market\nnow: "
READINGS = (  # name, what stands in the prompt, that prompt, the likeliest place after START, its probability, colour
    ("student", "question", QUESTION, "harbor", 0.47, "#0072B2"),
    ("teacher", "question + reference (forest)", f"{QUESTION}\nhint: forest", "forest", 0.99, "#00805E"),
    ("teacher, K contexts", "examples + the same", f"{DEMO}{QUESTION}\nhint: forest", "forest", 0.99, "#A8518A"),
    ("teacher, misled", "question + wrong one (castle)", f"{QUESTION}\nhint: castle", "castle", 1.00, "#C04E00"),
)
TERMS = (  # what the reading in the same row brings into the loss, and the step of train.py
    ("divergence", "student from teacher, clipped", "4 loss"),
    ("feature matching", "squared gap of their final states", ""),
    ("weight", "small where the K readings differ", "3 weigh"),
    ("contrast", "nearer to the teacher than to the\nmisled one", ""),
)
NOTE = """All four are the same network. The
teacher's weights are the student's as
they were (frozen), or a slow average
of them (EMA)."""
INK, GREY = "#222222", "#666666"
TOP, STEP, HIGH = 4.72, 1.22, 0.94  # of the readings: y of the first, distance, height


def box(axis, x, y, w, h, colour, title="", text="", width=1.4):
    for fill, edge in (("white", colour), (colour + "14", "none")):
        style = dict(boxstyle="round,pad=0,rounding_size=0.12", fc=fill, ec=edge, lw=width)
        axis.add_patch(FancyBboxPatch((x, y), w, h, **style))
    axis.text(x + 0.15, y + h - 0.16, title, color=colour, weight="bold", va="top", fontsize=10.5)
    axis.text(x + 0.15, y + h - 0.52, text, color=INK, va="top", fontsize=9.5, linespacing=1.4)


def arrow(axis, start, end, colour, width=1.5):
    how = dict(arrowstyle="-|>", color=colour, lw=width, shrinkA=0, shrinkB=0, mutation_scale=13, joinstyle="miter")
    axis.annotate("", end, start, arrowprops=how)


def draw(path: Path) -> None:
    """The picture, from left to right in the order of train.py's banners."""
    figure, axis = plt.subplots(figsize=(9.6, 5.2))
    figure.subplots_adjust(0, 0, 1, 1)
    axis.set(xlim=(0, 12), ylim=(0, 6.5))
    axis.axis("off")
    left, right, loss, rows = 3.75, 7.1, 8.55, [TOP - STEP * i for i in range(4)]
    middle = (rows[0] + rows[-1] + HIGH) / 2
    step = dict(fontsize=10, color=GREY)
    axis.text(0.15, 6.2, "One model, read several times", fontsize=15, weight="bold", va="center", color=INK)

    # 1 sample: the student answers alone
    box(axis, 0.15, TOP - 0.3, 2.6, HIGH + 0.3, GREY, "question", "where is toad: forest,\ncastle, tower, harbor")
    box(axis, 0.15, middle - 0.6, 2.6, 1.2, GREY, "the student's answer", "the toad is in the\nharbor")
    arrow(axis, (1.45, TOP - 0.3), (1.45, middle + 0.6), GREY)
    axis.text(1.6, (TOP - 0.3 + middle + 0.6) / 2, "1 sample", va="center", **step)

    # 2 score: the same answer is read under four prompts
    for (name, prompt, _, word, p, colour), y in zip(READINGS, rows, strict=True):
        bold, several = 2.8 if name == "student" else 1.4, "K" in name
        for back in (0.12, 0.06) if several else ():
            box(axis, left + back, y - back, right - left, HIGH, colour)
        box(axis, left, y, right - left, HIGH, colour, name, prompt, bold)
        arrow(axis, (2.75, middle), (left, y + HIGH / 2), GREY, 1.1)
        arrow(axis, (right + 0.12 * several, y + HIGH / 2), (loss, y + HIGH / 2), colour, bold + 0.2)
        axis.text((right + loss) / 2, y + HIGH / 2 + 0.1, f"{word} {p:.2f}", fontsize=9, color=colour, ha="center")
    axis.text(2.72, middle - 0.95, "2 score", va="center", ha="right", **step)

    # 3 weigh, 4 loss: every reading has its part
    box(axis, loss, 0.25, 3.3, TOP + HIGH - 0.25, INK)
    for (name, what, number), y in zip(TERMS, rows, strict=True):
        axis.text(loss + 0.18, y + HIGH - 0.16, name, fontsize=10.5, weight="bold", color=INK, va="top")
        axis.text(loss + 0.18, y + HIGH - 0.5, what, fontsize=9, color=INK, va="top", linespacing=1.3)
        axis.text(loss + 3.12, y + HIGH - 0.16, number, va="top", ha="right", **step)
    axis.plot((loss + 0.18, loss + 3.12), (0.95, 0.95), color=INK, lw=0.8)
    axis.text(loss + 0.18, 0.58, "loss = weight × divergence\n   + contrast + matching", fontsize=9.5, color=INK, va="center")

    # 5 update: one reading has a gradient
    blue, end, over = READINGS[0][-1], (left + right) / 2, 6.0
    axis.plot((10.225, 10.225, end), (TOP + HIGH, over, over), color=blue, lw=2.8, solid_joinstyle="miter")
    arrow(axis, (end, over + 0.015), (end, TOP + HIGH), blue, 2.8)
    axis.text(7.9, over + 0.12, "5 update: only this reading has a gradient", fontsize=10, color=blue, ha="center")
    axis.text(0.15, 0.25, NOTE, fontsize=9.5, color=INK, va="bottom", linespacing=1.4)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


if __name__ == "__main__":
    draw(Path(__file__).parents[1] / "docs" / "figures" / "idea.png")
