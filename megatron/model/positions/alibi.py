"""ALiBi (arXiv:2108.12409): adds a negative slope times the distance to the scores, with one slope a head.

Shapes: n heads, t tensor-parallel degree.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from megatron.distributed.param_init import ParamFactory
from megatron.model.positions.base import Positions
from megatron.param_table import Multipliers


def slopes(heads: int) -> list[float]:
    """Returns the slope of each head: 2^(-8 i / n) for i = 1 .. n if n is a power of two (section 3).

    Otherwise those of the power of two below n, and then every second one of the power of two above it, as the authors
    do.
    """
    power_of_two = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * number / power_of_two) for number in range(1, power_of_two + 1)]
    between = [2 ** (-4 * number / power_of_two) for number in range(1, 2 * power_of_two + 1, 2)]
    return first + between[: heads - power_of_two]


class Alibi(Positions, nn.Module):
    """Adds -slope * distance to the scores. It has no parameter. slopes: of this rank's heads."""

    def __init__(self, slopes: list[float]) -> None:
        super().__init__()
        self.slopes = slopes
        self._tables: dict[torch.device, Tensor] = {}
        self._on_device: dict[torch.device, Tensor] = {}

    @classmethod
    def for_scores(cls, model: Any, source: ParamFactory, multipliers: Multipliers) -> nn.Module:
        """Builds the biases of this rank's heads."""
        share = model.num_attention_heads // source.axis.size
        first = source.axis.rank * share
        every = [slope * multipliers.scores for slope in slopes(model.num_attention_heads)]
        return cls(every[first : first + share])

    def slopes_on(self, device: torch.device) -> Tensor:
        """Returns the slopes, fp32 [n/t]; the bias is exactly -slope * distance."""
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self.slopes, dtype=torch.float32, device=device)
        return self._on_device[device]

    def forward(self, length: int, device: torch.device) -> Tensor:
        """Returns the bias at distances 0 .. length - 1, fp32 [n/t, length]."""
        known = self._tables.get(device)
        if known is None or known.shape[1] < length:
            room = 1 << (length - 1).bit_length()
            distances = torch.arange(room, dtype=torch.float32, device=device)
            known = torch.outer(-self.slopes_on(device), distances)
            self._tables[device] = known
        return known[:, :length]
