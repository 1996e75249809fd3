"""Fixed sines and cosines added to the word embeddings (arXiv:1706.03762, section 3.5).

Shapes: s sequence, b micro batch, h hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron.distributed.param_init import InitFn, ParamFactory
from megatron.model.positions.base import Positions

BASE = 10000


class SinusoidalPositions(Positions, nn.Module):
    """Position p has sin(p w) for all frequencies w, then cos(p w), where w = 10000^(-2 i / h) for i below h / 2.

    It has no parameter. hidden_size is even.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        steps = torch.arange(0, hidden_size, 2, dtype=torch.float64, device="cpu") / hidden_size
        self.frequencies = (1.0 / BASE**steps).tolist()  # as Python floats, so that no cast of the model rounds them
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def for_embedding(cls, model: Any, source: ParamFactory, init_fn: InitFn) -> nn.Module:
        """Builds vectors as wide as the residual stream."""
        return cls(model.hidden_size, source.dtype)

    def forward(self, length: int, offset: int, positions: Tensor | None, device: torch.device) -> Tensor:
        """Returns the vectors of positions offset .. offset + length - 1, [s, 1, h].

        Args:
            length: Number of positions.
            offset: First position.
            positions: Position of each token [b, s]; the result is then [s, b, h].
            device: Device of the result.
        """
        table = self._table(offset + length, device)
        if positions is not None:
            return table[positions.t()].to(self.dtype)  # [s, b, h]
        return table[offset : offset + length].unsqueeze(1).to(self.dtype)  # [s, 1, h]

    def _table(self, length: int, device: torch.device) -> Tensor:
        """Returns at least that many positions, fp32 [length, h]; the memory grows by doubling."""
        known = self._tables.get(device)
        if known is None or known.shape[0] < length:
            room = 1 << (length - 1).bit_length()
            frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device="cpu")
            angles = torch.outer(torch.arange(room, dtype=torch.float64, device="cpu"), frequencies)
            known = torch.cat((angles.sin(), angles.cos()), dim=-1).float().to(device)
            self._tables[device] = known
        return known
