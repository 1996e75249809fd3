"""Draws docs/images/schedules.png: a step of every pipeline schedule on 4 ranks.

Run it with matplotlib installed: python docs/draw_schedules.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, Rectangle

from megatron.pipe_schedule.layout import PipeLayout
from megatron.pipe_schedule.order import BACKWARD, FORWARD, INPUT, WEIGHT
from megatron.pipe_schedule.timing import Timeline, timeline

RANKS, MICRO_BATCHES = 4, 8
SCHEDULES = {"1f1b": 1, "interleaved": 2, "zero_bubble": 2, "dualpipev": 2}
COLOURS = {FORWARD: "#1f6feb", BACKWARD: "#1a7f37", INPUT: "#1a7f37", WEIGHT: "#bf8700"}
NAMES = {FORWARD: "forward", INPUT: "gradients of activations", WEIGHT: "gradients of weights"}


def draw_step(axes: plt.Axes, step: Timeline) -> None:
    """One row a rank, one box a pass with the number of its micro batch; later stages of a rank are pale."""
    for rank, passes in enumerate(step.passes):
        for work, start, end in passes:
            pale = work.stage != step.layout.stages_of(rank)[0]
            parts = [(work.kind, start, end)]
            if work.kind == BACKWARD:
                middle = start + (end - start) * step.times.inputs / (step.times.inputs + step.times.weights)
                parts = [(INPUT, start, middle), (WEIGHT, middle, end)]
            for kind, left, right in parts:
                look = {"facecolor": COLOURS[kind], "alpha": 0.35 if pale else 0.8, "edgecolor": "white"}
                axes.add_patch(Rectangle((left, -rank - 0.45), right - left, 0.9, linewidth=0.6, **look))
                centre = ((left + right) / 2, -rank)
                axes.text(*centre, str(work.batch), ha="center", va="center", fontsize=5.5)
    axes.set_ylim(-RANKS + 0.4, 0.6)
    axes.set_yticks([-rank for rank in range(RANKS)], [f"rank {rank}" for rank in range(RANKS)], fontsize=8)
    axes.set_title(f"{step.layout.schedule}: bubble {step.bubble:.1%}", fontsize=9.5, loc="left")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([])


def main() -> None:
    """Writes the picture."""
    steps = [timeline(PipeLayout(name, RANKS, chunks), MICRO_BATCHES) for name, chunks in SCHEDULES.items()]
    figure, rows = plt.subplots(len(steps), figsize=(9.5, 7.0))
    for axes, step in zip(rows, steps, strict=True):
        draw_step(axes, step)
        axes.set_xlim(0, max(each.end for each in steps))
    boxes = [Patch(facecolor=COLOURS[kind], alpha=0.8, label=name) for kind, name in NAMES.items()]
    boxes.append(Patch(facecolor="#57606a", alpha=0.35, label="pale: the second stage of the rank"))
    figure.legend(handles=boxes, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(Path(__file__).parent / "images" / "schedules.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
