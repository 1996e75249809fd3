"""The power schedule (arXiv:2408.13359, section 4): a learning rate of the tokens trained, not of the horizon.

It is amplitude x samples of a batch x tokens ** exponent, at most the maximum. Over the last part of the horizon it
decays as WSD does, from the rate at the beginning of that part.
"""

from __future__ import annotations

from megatron.optim.lr_schedule import DECAY_SHAPES, DecayPoint, above_minimum, within_last


def power(point: DecayPoint) -> float:
    """Falls as a power of the tokens trained, then decays to the minimum."""
    within = within_last(point, point.decay_fraction)
    begin = max(point.horizon * (1.0 - point.decay_fraction), point.warmup)
    tokens = point.tokens if within == 0.0 else point.tokens * begin / point.step
    rate = point.keys["power_amplitude"] * point.batch * max(1.0, tokens) ** point.keys["power_exponent"]
    factor = above_minimum(point, min(1.0, rate / point.max_lr))
    return factor if within == 0.0 else factor * DECAY_SHAPES[point.decay_shape](within)
