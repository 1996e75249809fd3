"""Builds the reporter of a rank from the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.metrics.console import Console
from megatron.metrics.reporter import Reporter
from megatron.metrics.sinks.base import Observe, Sink, Start
from megatron.metrics.wandb_key import wandb_key
from megatron.registry import SINKS

_log = get_logger(__name__)


def select_sinks(observe: Observe) -> list[str]:
    """Returns the names of the sinks that are switched on; a run directory switches on the metrics file."""
    named = observe.sinks or ()
    return [entry.name for entry in SINKS if entry.name in named or _is_requested(observe, entry.key)]


def _is_requested(observe: Observe, key: str | None) -> bool:
    """Returns whether the key of a sink switches it on."""
    if key is None:
        return False
    return wants_wandb(observe) if key == "use_wandb" else bool(getattr(observe, key))


def wants_wandb(observe: Observe) -> bool:
    """Returns `use_wandb`; by default whether there is a key for the server and the package is installed."""
    if observe.use_wandb is not None:
        return observe.use_wandb
    if wandb_key(observe.wandb_host) is None:
        return False
    installed = find_spec("wandb") is not None
    if not installed:
        _log.warning("there is a key for Weights & Biases and no package wandb: pip install neox[wandb] to log there")
    return installed


def build_reporter(
    observe: Observe,
    rank: int,
    *,
    start_iteration: int = 0,
    settings: Mapping[str, Any] | None = None,
    hosts: Sequence[str] = (),
) -> Reporter:
    """Builds the reporter: rank 0 reports, other ranks only with wandb_init_all_ranks.

    Raises ConfigError when a sink's package is missing.

    Args:
        observe: the observe section.
        rank: of this process.
        start_iteration: iteration after which the run continues [steps].
        settings: the full configuration, for services that show it.
        hosts: of each rank, for the terminal.
    """
    start = Start(start_iteration, rank, settings or {})
    if rank != 0:
        everywhere = observe.wandb_init_all_ranks and wants_wandb(observe)
        return Reporter(_open_sinks(["wandb"] if everywhere else [], observe, start))
    return Reporter(_open_sinks(select_sinks(observe), observe, start), Console(hosts=hosts))


def _open_sinks(names: Sequence[str], observe: Observe, start: Start) -> list[Sink]:
    """Opens the sinks of those names. Errors of W&B are raised with `use_wandb: true`, else logged."""
    sinks: list[Sink] = []
    for name in names:
        try:
            sinks.append(SINKS.load(name).open(observe, start))
        except ConfigError as error:
            if name != "wandb" or observe.use_wandb:
                raise
            _log.warning("the run is not logged to Weights & Biases: %s; use_wandb: false says so for good", error)
    return sinks
