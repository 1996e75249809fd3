"""Draws docs/images/layout.svg: which rank holds what, in two worlds of 8 ranks.

Run it with matplotlib installed: python docs/draw_layout.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "layout"
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

COLOURS = ("#1f6feb", "#1a7f37", "#bf8700", "#8250df")


def draw(axes: plt.Axes, title: str, rows: str, columns: str, told: list[list[str]], colours: list[list[int]]) -> None:
    """One world as a grid of ranks: 2 pairs of columns, 2 rows."""
    axes.set_title(title, fontsize=10, loc="left")
    for rank in range(8):
        row, column = rank // 4, rank % 4
        place = (column * 1.1 + (column // 2) * 0.25, -row * 1.25)
        axes.add_patch(Rectangle(place, 1, 1, facecolor=COLOURS[colours[row][column]], alpha=0.16, edgecolor="#57606a"))
        axes.text(place[0] + 0.5, place[1] + 0.82, f"rank {rank}", ha="center", fontsize=9, weight="bold")
        axes.text(place[0] + 0.5, place[1] + 0.36, told[row][column], ha="center", va="center", fontsize=7.5)
    axes.text(2.3, -1.55, columns, ha="center", fontsize=8.5)
    axes.text(-0.15, 0.4, rows, ha="right", va="center", rotation=90, fontsize=8.5)
    axes.set_xlim(-0.6, 4.8)
    axes.set_ylim(-1.75, 1.2)
    axes.set_axis_off()


def main() -> None:
    """Writes the picture."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(7.2, 6.4))
    blocks = ("embedding\nblocks 0 to 3", "blocks 4 to 7\nhead")
    samples = ("samples A", "samples B")
    told = [
        [f"{blocks[stage]}\nhalf {column % 2} of each matrix\n{samples[column // 2]}" for column in range(4)]
        for stage in range(2)
    ]
    draw(
        upper,
        "pipe 2 x data 2 x model 2: a row is a stage, a pair of neighbours shares each matrix",
        "pipe",
        "data: left and right pair          model: within a pair",
        told,
        [[0, 1, 0, 1], [2, 3, 2, 3]],
    )
    told = [
        [f"all blocks\nhalf {column % 2} of each matrix\n{samples[row]}\ntokens, half {column // 2}" for column in range(4)]
        for row in range(2)
    ]
    draw(
        lower,
        "data 2 x context 2 x model 2: ranks of one colour hold the same slice and sum its gradient",
        "data",
        "context: left and right pair          model: within a pair",
        told,
        [[0, 1, 0, 1], [0, 1, 0, 1]],
    )
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "images" / "layout.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
