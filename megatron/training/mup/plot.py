"""Plot of a coordinate check: sizes over widths, a row with muP and one without, a column for each step.

The last column shows the change of the activations from before training to the last step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.errors import ConfigError
from megatron.training.mup.activation_stats import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "embedding": "#57606a",
    "attention": "#1f6feb",
    "mlp": "#1a7f37",
    "block": "#8250df",
    "final norm": "#bf8700",
    "logits": "#d1242f",
}
MARKERS = {"attention": "s", "mlp": "^"}


def require_matplotlib() -> None:
    """Raises ConfigError if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ConfigError.of(
            "its picture needs the package matplotlib", key="coord_check", value=True, hint="pip install 'neox[plot]'"
        )


def draw(curves: Mapping[str, Curves], path: Path, title: str) -> None:
    """Writes the plot. curves: by the name of the parametrization, a row each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = len(next(iter(next(iter(curves.values())).sizes.values())))
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        size = (2.4 * (steps + 1) + 1.6, 2.9 * len(curves) + 0.6)
        figure, grid = pyplot.subplots(
            len(curves), steps + 1, figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False
        )
        for row, (name, found) in zip(grid, curves.items(), strict=True):
            for step, axes in enumerate(row[:-1]):
                _panel(axes, found.widths, {part: sizes[step] for part, sizes in found.sizes.items()})
                axes.set_title(f"{name}, after {step} step{'s' * (step != 1)}", fontsize=9)
            _panel(row[-1], found.widths, {part: changes[-1] for part, changes in found.changes.items()})
            row[-1].set_title(f"{name}, change in {steps - 1} steps", fontsize=9)
            row[0].set_ylabel("mean |x|")
        for axes in grid[-1]:
            axes.set_xlabel("width")
        handles = {kind_of(str(line.get_label())): line for line in grid[0][0].get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
        figure.suptitle(title, fontsize=11)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def kind_of(part: str) -> str:
    """Returns the kind of a part, which determines its colour: all blocks are alike."""
    return next((kind for kind in ("attention", "mlp", "block") if kind in part), part)


def _panel(axes: Axes, widths: Sequence[int], sizes: Mapping[str, Sequence[float]]) -> None:
    for part, by_width in sizes.items():
        kind = kind_of(part)
        colour, marker = COLOURS[kind], MARKERS.get(kind, "o")
        axes.plot(widths, by_width, color=colour, marker=marker, markersize=3, linewidth=1.2, alpha=0.85, label=part)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.grid(color="#d0d7de", linewidth=0.5)
