"""Decay horizon of the learning rate: in steps, or in samples where the run's length is given in samples."""

from __future__ import annotations


def decay_horizon(train_iters: int | None, decay_iters: int | None, decay_fraction: float | None) -> int | None:
    """Returns the horizon [steps]: lr_decay_iters, else lr_decay_fraction x train_iters, else train_iters.

    At least 1. None where the length of the run is not known. With samples in place of steps it is in samples.
    """
    if decay_iters is not None:
        return max(1, decay_iters)
    if train_iters is None:
        return None
    if decay_fraction is not None:
        return max(1, int(train_iters * decay_fraction))
    return max(1, train_iters)
