"""Makes the reporter of a rank from the configuration."""

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


def chosen_sinks(observe: Observe) -> list[str]:
    """Names of the sinks that a configuration asks for; the metrics file needs no more than a run directory."""
    named = observe.sinks or ()
    return [entry.name for entry in SINKS if entry.name in named or _asked(observe, entry.key)]


def _asked(observe: Observe, key: str | None) -> bool:
    """Whether the key of a sink asks for it."""
    if key is None:
        return False
    return wants_wandb(observe) if key == "use_wandb" else bool(getattr(observe, key))


def wants_wandb(observe: Observe) -> bool:
    """`use_wandb`; where it is left out, whether the user has a key for that server and the package is installed."""
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
    """The reporter of this rank: rank 0 speaks, the others are silent, but for wandb_init_all_ranks.

    start_iteration: the iteration [steps] that the run continues after. settings: the whole configuration, for services
    that show it. hosts: of each rank, for the terminal. Raises ConfigError when a sink's package is missing.
    """
    start = Start(start_iteration, rank, settings or {})
    if rank != 0:
        everywhere = observe.wandb_init_all_ranks and wants_wandb(observe)
        return Reporter(_opened(["wandb"] if everywhere else [], observe, start))
    return Reporter(_opened(chosen_sinks(observe), observe, start), Console(hosts=hosts))


def _opened(names: Sequence[str], observe: Observe, start: Start) -> list[Sink]:
    """The sinks of those names. W&B stops a run only where `use_wandb: true` asks for it; a key alone does not."""
    sinks: list[Sink] = []
    for name in names:
        try:
            sinks.append(SINKS.load(name).open(observe, start))
        except ConfigError as error:
            if name != "wandb" or observe.use_wandb:
                raise
            _log.warning("the run is not logged to Weights & Biases: %s; use_wandb: false says so for good", error)
    return sinks
