"""Learning-rate schedules: pure functions from a place in the run to a rate.

Places count steps, or samples where the run's length is given in samples. The first update is at place 1 (or at its
number of samples), so that its rate is above zero. During warm-up the rate rises linearly and reaches the peak at
place `warmup`; after it a decay runs to `horizon`, and past the horizon the rate stays at its last value: it never
rises again. A function's name is the value of the key `lr_decay_style`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """Where a decay stands.

    progress: 0 at the end of warm-up, 1 at the horizon. place, warmup: [steps or samples]. floor: lowest rate as a part
    of the peak. tail: the part of the horizon in which WSD decays, in the shape `tail_shape`.
    """

    progress: float
    place: float
    warmup: float
    horizon: float
    floor: float
    tail: float
    tail_shape: str


Decay = Callable[[Moment], float]
"""Maps a moment to a factor: 1 is the peak, 0 the floor."""


@dataclass(frozen=True)
class Schedule:
    """The rate of every step of a run.

    peak, floor: highest and lowest rate. warmup, horizon: [steps or samples]. tail, tail_shape: see Moment.
    """

    decay: Decay
    peak: float
    floor: float
    warmup: int
    horizon: int
    tail: float = 0.1
    tail_shape: str = "linear"

    def rate(self, place: int) -> float:
        """The learning rate of the update at a place, which counts from 1."""
        place = max(1, place)
        if place <= self.warmup:
            return self.peak * place / self.warmup
        span = max(1, self.horizon - self.warmup)
        progress = min(1.0, (place - self.warmup) / span)
        ratio = self.floor / self.peak if self.peak else 0.0
        within = min(place, max(self.horizon, self.warmup + 1))
        moment = Moment(progress, within, self.warmup, self.horizon, ratio, self.tail, self.tail_shape)
        return self.floor + (self.peak - self.floor) * self.decay(moment)


def constant(moment: Moment) -> float:
    """Stays at the peak."""
    return 1.0


def linear(moment: Moment) -> float:
    """Falls in a straight line from the peak to the floor."""
    return 1.0 - moment.progress


def cosine(moment: Moment) -> float:
    """Half a cosine wave from the peak to the floor (arXiv:1608.03983, equation 5, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * moment.progress))


def exponential(moment: Moment) -> float:
    """Halves from the end of warm-up to the horizon."""
    return 0.5**moment.progress


def inverse_sqrt(moment: Moment) -> float:
    """Peak x sqrt(warmup / place), not below the floor (arXiv:1706.03762, section 5.3); the horizon ends it."""
    rate = math.sqrt(max(1.0, moment.warmup) / max(1.0, moment.place))
    return max(0.0, (rate - moment.floor) / (1 - moment.floor)) if moment.floor < 1 else 1.0


def wsd(moment: Moment) -> float:
    """Warm-up, stable, decay (arXiv:2404.06395): stays at the peak and falls to the floor in the horizon's last part.

    The fall is a straight line, a half cosine, or 1 - sqrt(x) (arXiv:2405.18392).
    """
    length = moment.tail * moment.horizon
    begin = max(moment.horizon - length, moment.warmup)
    if moment.place <= begin:
        return 1.0
    within = min(1.0, (moment.place - begin) / max(1e-9, moment.horizon - begin))
    return TAILS[moment.tail_shape](within)


TAILS: dict[str, Callable[[float], float]] = {
    "linear": lambda within: 1.0 - within,
    "cosine": lambda within: 0.5 * (1.0 + math.cos(math.pi * within)),
    "sqrt": lambda within: 1.0 - math.sqrt(within),
}


def build(
    decay: Decay,
    *,
    peak: float,
    floor: float,
    warmup_fraction: float,
    horizon: int,
    warmup: int | None = None,
    tail: float = 0.1,
    tail_shape: str = "linear",
) -> Schedule:
    """A schedule whose warm-up is `warmup`, else a fraction of the horizon, rounded down [steps or samples]."""
    rise = int(warmup_fraction * horizon) if warmup is None else warmup
    return Schedule(decay, peak, floor, rise, horizon, tail, tail_shape)
