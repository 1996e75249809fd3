"""Learning-rate schedules: pure functions from a step number to a rate.

Steps count from 1, the first update. During warm-up the rate rises linearly and reaches the peak at step `warmup`;
after it a decay runs to `horizon`, and past the horizon the rate stays at its last value: it never rises again.
A function's name is the value of the key `lr_decay_style`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Decay = Callable[[float], float]


@dataclass(frozen=True)
class Schedule:
    """The rate of every step of a run.

    decay: maps progress through the decay (0 at the end of warm-up, 1 at the horizon) to a factor of the peak.
    peak, floor: highest and lowest rate. warmup, horizon: [steps].
    """

    decay: Decay
    peak: float
    floor: float
    warmup: int
    horizon: int

    def rate(self, step: int) -> float:
        """The learning rate of update number `step`, which counts from 1."""
        step = max(1, step)
        if step <= self.warmup:
            return self.peak * step / self.warmup
        span = max(1, self.horizon - self.warmup)
        progress = min(1.0, (step - self.warmup) / span)
        return self.floor + (self.peak - self.floor) * self.decay(progress)


def constant(progress: float) -> float:
    """Stays at the peak."""
    return 1.0


def linear(progress: float) -> float:
    """Falls in a straight line from the peak to the floor."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """Half a cosine wave from the peak to the floor (arXiv:1608.03983, equation 5, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def exponential(progress: float) -> float:
    """Halves from the end of warm-up to the horizon."""
    return 0.5**progress


def build(decay: Decay, *, peak: float, floor: float, warmup_fraction: float, horizon: int) -> Schedule:
    """A schedule whose warm-up is a fraction of the horizon, rounded down [steps]."""
    return Schedule(decay, peak, floor, int(warmup_fraction * horizon), horizon)
