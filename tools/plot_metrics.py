#!/usr/bin/env python
"""Draws the loss curves and the learning rate of one or more runs into a picture.

    python tools/plot_metrics.py RUN_DIR_OR_FILE [...] [-o curve.png] [--title TEXT]

Each argument is a run directory or its metrics.jsonl. Train loss is drawn pale, its running mean and the validation
loss bold. Without -o the picture is beside the first run's metrics as `metrics.png`. Needs matplotlib, which
`pip install neox[plot]` brings.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import ConfigError, ConfigIssue
from megatron.metrics import read_metrics
from megatron.output_streams import run_tool

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#bf8700", "#0f8a8a", "#c2255c", "#57606a")
GREY = "#57606a"


@dataclass(frozen=True)
class Run:
    """The curves of one run."""

    name: str
    """Its name in the legend."""
    directory: Path
    """Its run directory."""
    curves: dict[str, tuple[list[int], list[float]]]
    """Metric -> iterations and values."""
    tokens_per_iteration: float | None
    """Mean tokens of an iteration; None if unknown."""

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        return self.curves.get(metric, ([], []))


def read_run(path: Path) -> Run:
    """Reads a run directory or metrics file. Raises ConfigError when there is nothing to draw."""
    try:
        records = read_metrics(path)
    except OSError as error:
        raise ConfigError.of(
            f"cannot read metrics ({error.strerror})",
            location=str(path),
            hint="name a run directory or a metrics.jsonl",
        ) from error
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for metric, value in record.items():
            if metric != "iteration" and isinstance(value, (int, float)) and math.isfinite(value):
                iterations, values = curves.setdefault(metric, ([], []))
                iterations.append(int(record["iteration"]))
                values.append(float(value))
    if not any(metric in curves for metric in ("train/lm_loss", "validation/lm_loss")):
        raise ConfigError.of("holds no loss", location=str(path), hint="wait for the first log line of the run")
    iterations, tokens = curves.get("consumed_tokens", ([], []))
    rate = tokens[-1] / iterations[-1] if iterations and iterations[-1] else None
    directory = path if path.is_dir() else path.parent
    return Run(directory.resolve().name, directory, curves, rate)


def running_mean(values: list[float], window: int) -> list[float]:
    """Returns the mean over `window` points around each; the window shrinks at the start, where the curve is steep."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half = window // 2
    means = []
    for at in range(len(values)):
        reach = min(half, at)
        last = min(at + reach, len(values) - 1)
        means.append((sums[last + 1] - sums[at - reach]) / (last + 1 - (at - reach)))
    return means


def draw(runs: list[Run], output: Path, title: str | None = None) -> None:
    """Writes the picture; the format follows the file name."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError.of("drawing needs matplotlib", hint="pip install 'neox[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (loss_axes, rate_axes) = pyplot.subplots(
            2, 1, figsize=(9, 6), sharex=True, height_ratios=(4, 1), layout="constrained"
        )
        for number, run in enumerate(runs):
            colour = COLOURS[number % len(COLOURS)]
            _draw_losses(loss_axes, run, colour, alone=len(runs) == 1)
            rate_axes.plot(*run.curve("train/learning_rate"), color=colour, linewidth=1.4)
        _finish_loss_axes(loss_axes, runs)
        _finish_rate_axes(rate_axes)
        figure.suptitle(title if title is not None else ", ".join(run.name for run in runs), fontsize=12)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
        pyplot.close(figure)


def _draw_losses(axes: Axes, run: Run, colour: str, *, alone: bool) -> None:
    prefix = "" if alone else f"{run.name}: "
    iterations, losses = run.curve("train/lm_loss")
    if iterations:
        means = running_mean(losses, window=max(1, len(losses) // 40))
        axes.plot(iterations, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(iterations, means, color=colour, linewidth=1.6, label=_labelled(prefix + "train", means))
    iterations, losses = run.curve("validation/lm_loss")
    if iterations:
        validation = COLOURS[1] if alone else colour
        axes.plot(
            iterations,
            losses,
            color=validation,
            linestyle="-" if alone else "--",
            marker="o",
            markersize=4,
            linewidth=1.4,
            label=_labelled(prefix + "validation", losses),
        )
    iterations, losses = run.curve("test/lm_loss")
    if iterations:
        label = _labelled(prefix + "test", losses)
        axes.plot(iterations, losses, color=colour, linestyle="", marker="*", markersize=11, label=label)


def _labelled(name: str, losses: list[float]) -> str:
    return f"{name}, last {losses[-1]:.3f}"


def _finish_loss_axes(axes: Axes, runs: list[Run]) -> None:
    axes.set_ylabel("loss [nats a token]")
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper right")
    rates = {run.tokens_per_iteration for run in runs}
    rate = rates.pop() if len(rates) == 1 else None
    if rate:
        top: Any = axes.secondary_xaxis("top", functions=(lambda x: x * rate, lambda x: x / rate))
        top.set_xlabel("training tokens", color=GREY)
        top.tick_params(colors=GREY)
        top.spines["top"].set_visible(False)
        top.xaxis.set_major_formatter(lambda tokens, _: human_count(tokens))


def _finish_rate_axes(axes: Axes) -> None:
    axes.set_xlabel("iteration")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axes.ticklabel_format(axis="y", style="scientific", scilimits=(0, 0), useMathText=True)
    axes.xaxis.set_major_formatter(lambda iteration, _: f"{iteration:,.0f}")


def human_count(number: float) -> str:
    """Formats 1,500,000 as `1.5 M`."""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def main(arguments: list[str] | None = None) -> int:
    """Draws the runs; returns 0, or 2 with a line on stderr for each error."""
    parser = argparse.ArgumentParser(description="Draw the loss curves of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR_OR_FILE")
    parser.add_argument(
        "-o", "--output", type=Path, help="picture to write (default: metrics.png beside the first run)"
    )
    parser.add_argument("--title")
    args = parser.parse_args(arguments)
    runs: list[Run] = []
    issues: list[ConfigIssue] = []
    for path in args.runs:
        try:
            runs.append(read_run(path))
        except ConfigError as error:
            issues += error.issues
    try:
        ConfigError.raise_any(issues)
        output = args.output or runs[0].directory / "metrics.png"
        draw(runs, output, args.title)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        what = f"the picture cannot be written: {error.strerror}"
        print(
            ConfigError.of(what, key="--output", value=str(output), hint="write it elsewhere with -o"), file=sys.stderr
        )
        return ConfigError.exit_code
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
