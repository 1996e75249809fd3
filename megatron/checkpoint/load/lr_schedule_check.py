"""The learning-rate schedule that a checkpoint was trained with, and what a run does where its own is another one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.config.schema.optimizer import OptimizerSection
from megatron.config.schema.schedule import ScheduleSection
from megatron.errors import ConfigError, ConfigIssue
from megatron.log import get_logger

_log = get_logger(__name__)

_KEYS = (
    "lr_decay_style",
    "lr_decay_iters",
    "lr_decay_samples",
    "min_lr",
    "warmup",
    "warmup_iters",
    "wsd_decay_fraction",
    "wsd_decay_style",
    "infinite_constant_lr",
    "infinite_cooldown_fraction",
    "infinite_anneal_fraction",
    "power_amplitude",
    "power_exponent",
)


def schedule_facts(schedule: ScheduleSection, optimizer: OptimizerSection) -> dict[str, Any]:
    """The keys that decide the rate of every step, with their values."""
    return {"lr": optimizer.lr, **{key: getattr(schedule, key) for key in _KEYS}}


def schedule_to_use(
    stored: Mapping[str, Any], own: Mapping[str, Any], *, take_stored: bool, location: Path
) -> Mapping[str, Any]:
    """The stored values, or the run's own where nothing is stored of a key.

    Raises ConfigError for each key that differs, unless it is set.

    Args:
        stored: What `schedule_facts` gave then and now.
        own: What `schedule_facts` gave then and now.
        take_stored: `use_checkpoint_lr_scheduler`.
        location: The checkpoint, for messages.
    """
    known = {key: stored[key] for key in own if key in stored}
    if not take_stored:
        ConfigError.raise_any(
            ConfigIssue(
                f"the checkpoint {location} was trained with {known[key]!r}",
                key=key,
                value=own[key],
                hint="set override_lr_scheduler to take this one, or use_checkpoint_lr_scheduler to take that one",
            )
            for key in known
            if known[key] != own[key]
        )
    return {**own, **known}


def warn_of_early_end(schedule: Mapping[str, Any], train_iters: int | None, location: Path) -> None:
    """A line where the rate of a checkpoint's schedule stays at its floor before the run ends.

    schedule: the one to use. train_iters [steps]: of the run.
    """
    horizon = schedule.get("lr_decay_iters")
    if horizon is None or train_iters is None or horizon >= train_iters or schedule["lr_decay_style"] == "constant":
        return
    _log.warning(
        "the schedule of %s ends at iteration %d: from there to iteration %d the learning rate stays at its last value "
        "(min_lr is %g); override_lr_scheduler takes this run's own schedule",
        location,
        horizon,
        train_iters,
        schedule.get("min_lr") or 0.0,
    )
