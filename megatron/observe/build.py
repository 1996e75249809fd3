"""Makes the reporter of a rank from the configuration."""

from __future__ import annotations

from megatron.observe.console import Console
from megatron.observe.reporter import Reporter
from megatron.observe.sinks.base import Observe
from megatron.registry import SINKS


def chosen_sinks(observe: Observe) -> list[str]:
    """Names of the sinks that a configuration asks for; the metrics file needs no more than a run directory."""
    chosen = []
    if observe.log_dir is not None:
        chosen.append("jsonl")
    if observe.tensorboard_dir is not None:
        chosen.append("tensorboard")
    return chosen


def build_reporter(observe: Observe, rank: int, *, start_iteration: int = 0) -> Reporter:
    """The reporter of this rank: rank 0 speaks, the others are silent.

    start_iteration: the iteration [steps] that the run continues after. Raises ConfigError when a sink's package is
    missing.
    """
    if rank != 0:
        return Reporter()
    sinks = [SINKS.load(name).open(observe, start_iteration) for name in chosen_sinks(observe)]
    return Reporter(sinks, Console())
