"""Losses beside that of tokens, which are reported apart: of the order of sentences, of further tokens."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.mesh import Topology

ORDER = "sop_loss"
FURTHER = "mtp_"
"""What begins names of losses of further tokens, which take labels of tokens."""


class LossParts:
    """Sums of the values that the last stage of a rank has computed since they were taken."""

    def __init__(self, names: tuple[str, ...] = (ORDER,), factor: float = 1.0) -> None:
        """Begins with nothing.

        Args:
            names: of the losses.
            factor: by which each is added to the loss that is minimised.
        """
        self._names = names
        self.factor = factor
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = dict.fromkeys(names, 0)

    def note(self, name: str, value: Tensor, count: Tensor | int = 1) -> None:
        """Records the value of one micro batch, a scalar.

        Args:
            name: of the loss.
            value: of the micro batch, or a sum over what it has.
            count: how many values the sum has.
        """
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts[name] + count

    def take(self, topology: Topology, device: torch.device) -> dict[str, Tensor]:
        """Returns name -> mean over micro batches and ranks since the last call; collective."""
        zero = torch.zeros((), device=device)
        totals = torch.stack(
            [self._sums.get(name, zero) for name in self._names]
            + [_on_device(self._counts[name], device) for name in self._names]
        )
        for axis in (topology.dp_cp, topology.pipe):
            if axis.size > 1:
                dist.all_reduce(totals, group=axis.group)
        self._sums, self._counts = {}, dict.fromkeys(self._names, 0)
        sums, counts = totals.chunk(2)
        return dict(zip(self._names, (sums / counts.clamp(min=1)).unbind(), strict=True))


def _on_device(count: Tensor | int, device: torch.device) -> Tensor:
    """Returns a count in fp32; a number is filled in there, since a copy from the host would wait for the device."""
    return count.float() if isinstance(count, Tensor) else torch.full((), float(count), device=device)
