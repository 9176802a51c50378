"""idea.py - draws docs/figures/idea.png, the picture in the README:  python -m experiments.idea"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"


def box(axis, x, y, w, h, title, text, colour):
    shape = FancyBboxPatch(
        (x, y), w, h, boxstyle="round,pad=0.02,rounding_size=0.1", fc=colour + "18", ec=colour, lw=1.6
    )
    axis.add_patch(shape)
    axis.text(x + 0.12, y + h - 0.2, title, color=colour, weight="bold", va="top", fontsize=10.5)
    axis.text(x + 0.12, y + h - 0.58, text, va="top", fontsize=9, linespacing=1.5)


def arrow(axis, start, end, text="", colour=GREY, offset=(0, 0.08), style="-|>"):
    axis.annotate("", end, start, arrowprops=dict(arrowstyle=style, color=colour, lw=1.5, shrinkA=2, shrinkB=2))
    if text:
        x, y = (start[0] + end[0]) / 2 + offset[0], (start[1] + end[1]) / 2 + offset[1]
        axis.text(x, y, text, color=colour, fontsize=9, ha="center", va="bottom")


def draw(path: Path) -> None:
    figure, axis = plt.subplots(figsize=(10.6, 5.3), layout="constrained")
    axis.set(xlim=(0, 12.4), ylim=(-0.15, 6.1))
    axis.axis("off")
    box(axis, 0.1, 2.4, 2.6, 1.35, "student", "question\nπ(· | x)", BLUE)
    box(axis, 4.0, 2.4, 2.9, 1.35, "its own answer ŷ", "sampled token by token,\nthen re-read by everyone", GREY)
    box(axis, 8.4, 4.75, 3.8, 1.2, "teacher", "question + reference", GREEN)
    box(axis, 8.4, 3.25, 3.8, 1.2, "teacher, K contexts", "demonstrations + question + reference", PURPLE)
    box(axis, 8.4, 1.75, 3.8, 1.2, "teacher, misled", "question + wrong reference", ORANGE)
    box(
        axis,
        8.4,
        0.05,
        3.8,
        1.3,
        "where the teacher comes from",
        "the same model: frozen,\nor its slow average (EMA)",
        GREY,
    )
    arrow(axis, (2.75, 3.1), (3.95, 3.1), "1 sample", BLUE)
    for y, colour in ((5.35, GREEN), (3.85, PURPLE), (2.35, ORANGE)):
        arrow(axis, (6.95, 3.1), (8.35, y), "", colour)
    axis.text(7.55, 4.85, "2 score", fontsize=9, color=GREY, ha="center")
    loss = "D( teacher, student ), clipped   ×   agreement of the K contexts\n"
    loss += "+ contrast with the misled teacher   + feature matching"
    box(axis, 0.1, 0.05, 6.8, 1.3, "3 loss, per token", loss, GREY)
    arrow(axis, (8.35, 1.95), (6.95, 0.85), "", GREY)
    axis.text(7.0, 0.2, "log-probs and\nstates, of all", fontsize=9, color=GREY, ha="left")
    arrow(axis, (5.4, 2.35), (4.3, 1.4), "", GREY)
    arrow(axis, (1.4, 1.4), (1.4, 2.35), "4 update", BLUE, offset=(0.62, -0.12))
    axis.text(0.1, 5.75, "One model, read several times", fontsize=15, weight="bold", va="center")
    axis.text(
        0.1,
        5.2,
        "It answers alone. With a reference in its prompt it re-reads\nthat same answer, and the student learns the difference.",
        fontsize=10,
        va="top",
        color=GREY,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).parents[1] / "docs" / "figures" / "idea.png")
