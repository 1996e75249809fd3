"""Draws docs/images/axes.png: what each of two ranks holds along every axis.

Run it with matplotlib installed: python docs/draw_axes.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

COLOURS = ("#1f6feb", "#1a7f37")
WHOLE, LAYERS, SLICE, OTHER, HEADS = "whole", "layers", "slice", "other", "heads"
KINDS = ("parameters", "gradients", "optimizer", "residual\nstream", "inside\nblocks")
AXES: dict[str, tuple[str, ...]] = {
    "data": (WHOLE, WHOLE, WHOLE, OTHER, OTHER),
    "data, ZeRO 1": (WHOLE, WHOLE, SLICE, OTHER, OTHER),
    "data, ZeRO 2": (WHOLE, SLICE, SLICE, OTHER, OTHER),
    "data, ZeRO 3": (SLICE, SLICE, SLICE, OTHER, OTHER),
    "tensor": (SLICE, SLICE, SLICE, WHOLE, SLICE),
    "tensor, sequence": (SLICE, SLICE, SLICE, HEADS, SLICE),
    "context": (WHOLE, WHOLE, WHOLE, HEADS, HEADS),
    "pipeline": (LAYERS, LAYERS, LAYERS, LAYERS, LAYERS),
}
"""How each kind is held: all of it, one rank's layers, its slice of every matrix, other samples, part of the tokens."""


def draw_box(axes: plt.Axes, x: float, y: float, how: str, rank: int) -> None:
    """One kind on one rank: a frame, filled where the rank holds it."""
    width, height = 0.8, 0.62
    axes.add_patch(Rectangle((x, y), width, height, facecolor="white", edgecolor="#57606a", linewidth=0.8))
    left, bottom, w, h = x, y, width, height
    if how == SLICE:
        left, w = x + rank * width / 2, width / 2
    if how in (LAYERS, HEADS):
        bottom, h = y + (1 - rank) * height / 2, height / 2
    hatch = {OTHER: "///" if rank else None, HEADS: "..", LAYERS: "--"}.get(how)
    look = {"facecolor": COLOURS[rank], "alpha": 0.35, "edgecolor": "#57606a", "linewidth": 0, "hatch": hatch}
    axes.add_patch(Rectangle((left, bottom), w, h, **look))


def main() -> None:
    """Writes the picture."""
    figure, axes = plt.subplots(figsize=(8.2, 7.6))
    for row, (name, held) in enumerate(AXES.items()):
        y = -row
        axes.text(-0.25, y + 0.31, name, ha="right", va="center", fontsize=9.5)
        for rank in range(2):
            for column, how in enumerate(held):
                draw_box(axes, rank * 5.3 + column * 0.98, y, how, rank)
    for rank in range(2):
        axes.text(rank * 5.3 + 2.4, 1.62, f"rank {rank}", ha="center", fontsize=11, weight="bold")
        for column, kind in enumerate(KINDS):
            axes.text(rank * 5.3 + column * 0.98 + 0.4, 0.78, kind, ha="center", fontsize=6.6)
    legend = (
        "full box: all of it      left or right half: a slice of every matrix      "
        "upper or lower half, dashed: some of the layers\n"
        "dotted: a part of every sequence's tokens      striped: the same amount, of other samples"
    )
    axes.text(5.0, -len(AXES) + 0.72, legend, ha="center", va="top", fontsize=8)
    axes.set_xlim(-2.1, 10.3)
    axes.set_ylim(-len(AXES) + 0.2, 1.95)
    axes.set_axis_off()
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "images" / "axes.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
