"""Terminal output: one live line that is rewritten in place, or plain lines where the output is not a terminal.

The launcher pipes the workers' output, so a worker cannot see the user's terminal; the launcher sets the environment
variable NEOX_TTY=1 for a terminal (0 for plain lines even on a terminal).
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

_ERASE_LINE = "\r\x1b[2K"
_SMOOTHING = 0.3  # weight of the newest iteration time in the estimate of the time left
_REDRAW_SECONDS = 0.2


def is_live(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Returns whether a line on this stream can be rewritten in place."""
    requested = environment.get("NEOX_TTY")
    if requested:
        return requested != "0"
    return stream.isatty()


class Console:
    """Prints the records of the reporter.

    Args:
        stream: File to print to; standard output unless given.
        live: Rewrite one line instead of printing a line a record; by default on a terminal.
        clock: Seconds.
        hosts: Names of the hosts.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        hosts: Sequence[str] = (),
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self.live = is_live(self._stream, os.environ) if live is None else live
        self._clock = clock
        self._hosts = hosts
        self._line = ""  # what is on the live line now
        self._metrics: Mapping[str, float] = {}
        self._total = 0
        self._iteration_time: float | None = None
        self._drawn_at = -math.inf

    def train(self, iteration: int, metrics: Mapping[str, float], total_iterations: int) -> None:
        """Prints a training record."""
        self._metrics, self._total = metrics, total_iterations
        self._smooth(metrics.get("runtime/iteration_time"))
        line = self._training_line(iteration)
        if self.live:
            self._draw(line)
        else:
            self._print(line)

    def progress(self, iteration: int) -> None:
        """Updates the live line between two training records; at most five times a second."""
        if not self.live or not self._line or self._clock() - self._drawn_at < _REDRAW_SECONDS:
            return
        self._draw(self._training_line(iteration))

    def evaluation(self, iteration: int, split: str, metrics: Mapping[str, float]) -> None:
        """Prints an evaluation on a line of its own."""
        self._print(evaluation_line(iteration, split, metrics))

    def message(self, text: str) -> None:
        """Prints a message on a line of its own."""
        self._print(text)

    def close(self) -> None:
        """Ends the live line."""
        if self._line:
            self._stream.write("\n")
            self._line = ""
        self._stream.flush()

    def _training_line(self, iteration: int) -> str:
        return training_line(iteration, self._total, self._metrics, self._seconds_left(iteration), self._hosts)

    def _print(self, text: str) -> None:
        live_line = self._line
        if live_line:
            self._stream.write(_ERASE_LINE)
        self._stream.write(text + "\n")
        self._line = ""
        if live_line:
            self._draw(live_line)
        self._stream.flush()

    def _draw(self, line: str) -> None:
        width = shutil.get_terminal_size((120, 24)).columns
        self._line = line
        self._stream.write(_ERASE_LINE + line[: max(width - 1, 20)])
        self._stream.flush()
        self._drawn_at = self._clock()

    def _smooth(self, seconds: float | None) -> None:
        if seconds is None or not math.isfinite(seconds):
            return
        before = seconds if self._iteration_time is None else self._iteration_time
        self._iteration_time = (1 - _SMOOTHING) * before + _SMOOTHING * seconds

    def _seconds_left(self, iteration: int) -> float | None:
        if self._iteration_time is None:
            return None
        return max(self._total - iteration, 0) * self._iteration_time


def training_line(
    iteration: int,
    total_iterations: int,
    metrics: Mapping[str, float],
    seconds_left: float | None,
    hosts: Sequence[str] = (),
) -> str:
    """Formats `iteration 120/3,000 | loss 4.1 | 12,345 tokens/s | MFU 41.2 % | 3m 20s left | lr 3.00e-04 | grad norm
    1`.

    Missing metrics are left out. The most important ones are first, since a narrow terminal truncates the end.

    Args:
        iteration: of the record.
        total_iterations: of the run.
        metrics: by name.
        seconds_left: estimate of the time left.
        hosts: of each rank, to name the slowest rank's host.
    """
    parts = [f"iteration {iteration:,}/{total_iterations:,}"]
    formats: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("train/lm_loss", lambda value: f"loss {value:.4f}"),
        ("train/sop_loss", lambda value: f"sop loss {value:.4f}"),
        ("runtime/tokens_per_sec", lambda value: f"{value:,.0f} tokens/s"),
        ("runtime/model_flops_utilization", lambda value: f"MFU {100 * value:.1f} %"),
    )
    parts += [format_value(metrics[name]) for name, format_value in formats if name in metrics]
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    if "train/learning_rate" in metrics:
        parts.append(f"lr {metrics['train/learning_rate']:.2e}")
    if "train/grad_norm" in metrics:
        parts.append(f"grad norm {metrics['train/grad_norm']:.3g}")
    if metrics.get("train/loss_scale", 1.0) != 1.0:
        parts.append(f"loss scale {metrics['train/loss_scale']:g}")
    if "runtime/slowest_rank" in metrics and hosts:
        slowest = int(metrics["runtime/slowest_rank"])
        parts.append(f"slowest rank {slowest} ({hosts[slowest]}) {metrics['runtime/slowest_rank_ratio']:.2f}x")
    return " | ".join(parts)


def evaluation_line(iteration: int, split: str, metrics: Mapping[str, float]) -> str:
    """Formats `validation at iteration 500 | lm_loss 3.2100 | lm_loss_ppl 24.78`."""
    parts = [f"{split} at iteration {iteration:,}"]
    parts += [f"{name.removeprefix(split + '/')} {value:.4f}" for name, value in metrics.items()]
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """Formats a duration in its two largest units: `45s`, `3m 20s`, `2h 05m`, `4d 03h`."""
    if not math.isfinite(seconds):
        return "?"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded}s"
    if rounded < 3600:
        return f"{rounded // 60}m {rounded % 60:02d}s"
    if rounded < 86400:
        return f"{rounded // 3600}h {rounded % 3600 // 60:02d}m"
    return f"{rounded // 86400}d {rounded % 86400 // 3600:02d}h"
