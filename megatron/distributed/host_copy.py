"""Copies of scalars that the host reads later, without waiting for what the device was given after them."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of tensors to the host that runs behind the device's work so far; on a CPU the tensors themselves."""

    def __init__(self, *values: Tensor) -> None:
        """Starts the copy. values: tensors of one element."""
        self._values = [value.detach().to("cpu", non_blocking=True) for value in values]
        self._done: torch.cuda.Event | None = None
        if any(value.is_cuda for value in values):
            self._done = torch.cuda.Event()
            self._done.record()

    def read(self) -> list[float]:
        """Returns the values; waits for the device's work up to the start of the copy and no further."""
        if self._done is not None:
            self._done.synchronize()
        return [float(value) for value in self._values]
