"""Schedules whose constant part may be as long as wanted, for training that goes on with more data (arXiv:2403.08763).

After warmup the learning rate cools down to a constant one, stays there, and is annealed to the minimum in the last
part of the horizon (section 7.4 there). A run that goes on from the constant part needs no second warmup.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron.optim.lr_schedule import DecayPoint, above_minimum, within_last

_STEEPNESS = 10.0
"""How steep the inverse square root begins."""


def infinite_cosine(point: DecayPoint) -> float:
    """Cools down by half a cosine wave."""
    return _infinite(point, lambda x: 0.5 * (1.0 + math.cos(math.pi * x)))


def infinite_inv_sqrt(point: DecayPoint) -> float:
    """Cools down by an inverse square root, shifted and scaled to end at the constant rate."""
    return _infinite(point, lambda x: 1.0 - _root(x) / _root(1.0))


def _root(x: float) -> float:
    return 1.0 / math.sqrt(1.0 + _STEEPNESS * x) - 1.0


def _infinite(point: DecayPoint, cooldown: Callable[[float], float]) -> float:
    """Returns the factor of the decay. cooldown: from 1 at 0 to 0 at 1."""
    constant = point.keys["infinite_constant_lr"] / point.max_lr
    annealed = within_last(point, point.keys["infinite_anneal_fraction"])
    if annealed > 0.0:
        return above_minimum(point, constant * (point.min_lr / constant) ** annealed)
    length = max(1e-9, point.keys["infinite_cooldown_fraction"] * point.horizon)
    passed = min(1.0, (point.step - point.warmup) / length)
    return above_minimum(point, constant + (1.0 - constant) * cooldown(passed))
