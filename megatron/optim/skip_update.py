"""Optimizers that leave out an update by a flag on the device, so that the host need not wait for it.

torch's fused Adam and SGD take such a flag for mixed precision: where it is 1 they change neither weights, moments nor
the number of updates. Other optimizers have to be spared the call, which takes a read of the flag by the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def skips_on_device(optimizer: object) -> bool:
    """Returns whether `set_skip` works with the optimizer."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def set_skip(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Has the coming steps of a fused optimizer change nothing where `skip`, a bool scalar on its device, is true."""
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
