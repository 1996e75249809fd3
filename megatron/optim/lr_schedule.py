"""Learning-rate schedules: pure functions from a step to a learning rate.

A step is an update, or a number of samples if the run's length is given in samples. The first update is step 1 (or its
number of samples), so that its learning rate is above zero. During warmup the learning rate rises linearly and reaches
the maximum at step `warmup`; then it decays up to `horizon`, and stays at its last value after that: it never rises
again. A function's name is the value of the key `lr_decay_style`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DecayPoint:
    """One point of a decay."""

    progress: float
    """0 at the end of warmup, 1 at the horizon."""
    step: float
    """[steps or samples]."""
    warmup: float
    """[steps or samples]."""
    horizon: float
    """[steps or samples]."""
    min_lr: float
    """Lowest learning rate as a fraction of the maximum."""
    decay_fraction: float
    """Fraction of the horizon in which WSD decays."""
    decay_shape: str
    """Shape of that decay."""
    max_lr: float = 1.0
    """Learning rate after warmup."""
    batch: float = 1.0
    """Samples of an update."""
    tokens: float = 0.0
    """Tokens of all updates up to the step."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Values of the keys that the registry lists for the schedule."""


Decay = Callable[[DecayPoint], float]
"""Maps a point to a factor: 1 is the maximum, 0 the minimum."""


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate of every step of a run."""

    decay: Decay
    """Learning rate after warmup as a function of the progress."""
    max_lr: float
    """Learning rate after warmup."""
    min_lr: float
    """Lowest learning rate of the decay."""
    warmup: int
    """[steps or samples]."""
    horizon: int
    """[steps or samples]."""
    decay_fraction: float = 0.1
    """See DecayPoint."""
    decay_shape: str = "linear"
    """See DecayPoint."""
    batch: float = 1.0
    """See DecayPoint."""
    tokens_per_step: float = 1.0
    """Tokens of an update, or of a sample if steps are samples."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """See DecayPoint."""

    def lr(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 1."""
        step = max(1, step)
        return self._decayed(self.warmup) * step / self.warmup if step < self.warmup else self._decayed(step)

    def _decayed(self, step: int) -> float:
        """Returns the learning rate of a step from the end of warmup."""
        span = max(1, self.horizon - self.warmup)
        ratio = self.min_lr / self.max_lr if self.max_lr else 0.0
        within = min(step, max(self.horizon, self.warmup + 1))
        point = DecayPoint(
            progress=min(1.0, (step - self.warmup) / span),
            step=within,
            warmup=self.warmup,
            horizon=self.horizon,
            min_lr=ratio,
            decay_fraction=self.decay_fraction,
            decay_shape=self.decay_shape,
            max_lr=self.max_lr,
            batch=self.batch,
            tokens=within * self.tokens_per_step,
            keys=self.keys,
        )
        factor = self.decay(point)
        return self.max_lr if factor == 1.0 else self.min_lr + (self.max_lr - self.min_lr) * factor


def constant(point: DecayPoint) -> float:
    """Stays at the maximum."""
    return 1.0


def linear(point: DecayPoint) -> float:
    """Decays linearly from the maximum to the minimum."""
    return 1.0 - point.progress


def cosine(point: DecayPoint) -> float:
    """Decays by half a cosine wave (arXiv:1608.03983, equation 5, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * point.progress))


def exponential(point: DecayPoint) -> float:
    """Halves from the end of warmup to the horizon, not below the minimum."""
    return above_minimum(point, 0.5**point.progress)


def inverse_sqrt(point: DecayPoint) -> float:
    """Maximum x sqrt(warmup / step), not below the minimum (arXiv:1706.03762, section 5.3), up to the horizon."""
    return above_minimum(point, math.sqrt(max(1.0, point.warmup) / max(1.0, point.step)))


def above_minimum(point: DecayPoint, lr: float) -> float:
    """Returns the factor of a learning rate that is given as a fraction of the maximum; the minimum bounds it."""
    return max(0.0, (lr - point.min_lr) / (1 - point.min_lr)) if point.min_lr < 1 else 1.0


def wsd(point: DecayPoint) -> float:
    """Warmup, stable, decay (arXiv:2404.06395): stays at the maximum and decays in the last fraction of the horizon.

    The decay is linear, a half cosine, or 1 - sqrt(x) (arXiv:2405.18392).
    """
    within = within_last(point, point.decay_fraction)
    return DECAY_SHAPES[point.decay_shape](within) if within > 0 else 1.0


def within_last(point: DecayPoint, fraction: float) -> float:
    """Returns how much of the last fraction of the horizon has passed, from 0 to 1; it begins after warmup."""
    begin = max(point.horizon - fraction * point.horizon, point.warmup)
    return min(1.0, max(0.0, point.step - begin) / max(1e-9, point.horizon - begin))


DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda within: 1.0 - within,
    "cosine": lambda within: 0.5 * (1.0 + math.cos(math.pi * within)),
    "sqrt": lambda within: 1.0 - math.sqrt(within),
}


def build(
    decay: Decay,
    *,
    max_lr: float,
    min_lr: float,
    warmup_fraction: float,
    horizon: int,
    warmup: int | None = None,
    decay_fraction: float = 0.1,
    decay_shape: str = "linear",
    batch: float = 1.0,
    tokens_per_step: float = 1.0,
    keys: Mapping[str, Any] | None = None,
) -> LRSchedule:
    """Builds a schedule.

    Args:
        decay: shape of the schedule after warmup.
        max_lr: learning rate after warmup.
        min_lr: lowest learning rate of the decay.
        warmup_fraction: length of warmup as a fraction of the horizon, rounded down; unless `warmup` is set.
        horizon: end of the decay [steps or samples].
        warmup: length of warmup [steps or samples].
        decay_fraction: fraction of the horizon in which WSD decays.
        decay_shape: shape of that decay.
        batch: samples of an update.
        tokens_per_step: tokens of an update, or of a sample if steps are samples.
        keys: values of the keys that the registry lists for the schedule.
    """
    rise = int(warmup_fraction * horizon) if warmup is None else warmup
    return LRSchedule(
        decay, max_lr, min_lr, rise, horizon, decay_fraction, decay_shape, batch, tokens_per_step, keys or {}
    )
