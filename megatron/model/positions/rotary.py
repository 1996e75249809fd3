"""Rotary positions: queries and keys are turned by their position (arXiv:2104.09864).

Only the first ``rotary_pct`` of each head's features turn; they are paired half-split, as GPT-NeoX and Llama do.
Shapes: s sequence, b micro batch, n heads, d head dim, r turned features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.kernels.rotary import RotaryKernel, rotary
from megatron.model.positions.base import Positions


class Rotary(Positions):
    """Turns pair i of position p by the angle p * base^(-2 i / r).

    turned: number of features r that turn. It holds no parameter; the table of cosines grows when a longer sequence
    comes and is shared by all blocks.
    """

    def __init__(self, turned: int, base: float, kernel: RotaryKernel = rotary) -> None:
        if turned < 2 or turned % 2:
            raise ValueError(f"rotary positions turn pairs of features, and {turned} is not an even number above 0")
        self.turned = turned
        self.base = base
        self.kernel = kernel
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def for_attention(cls, model: Any, head_dim: int, kernel: RotaryKernel) -> Rotary:
        """From the model section's rotary_pct and rotary_emb_base."""
        return cls(int(head_dim * model.rotary_pct), model.rotary_emb_base, kernel)

    def __call__(self, x: Tensor, offset: int, positions: Tensor | None = None) -> Tensor:
        """Queries or keys [b, n, s, d] whose first position is ``offset`` -> the turned ones; see base.py."""
        end = offset + x.shape[2]
        cos, sin = self.table(end, x.device)
        if positions is not None:
            return self.kernel(x, cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))  # of [b, 1, s, r/2]
        return self.kernel(x, cos[offset:end], sin[offset:end])

    def table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of at least ``length`` positions, fp32 [length, r/2]."""
        known = self._tables.get(device)
        if known is None or known[0].shape[0] < length:
            room = 1 << (length - 1).bit_length()
            steps = torch.arange(0, self.turned, 2, dtype=torch.float32, device=device) / self.turned
            angles = torch.outer(torch.arange(room, dtype=torch.float32, device=device), 1.0 / self.base**steps)
            known = (angles.cos(), angles.sin())
            self._tables[device] = known
        return known
