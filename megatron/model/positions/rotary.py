"""Rotary positions: queries and keys are rotated by their position (arXiv:2104.09864).

Only the first ``rotary_pct`` of each head's features are rotated; they are paired half-split, as in GPT-NeoX and Llama.
rope_frequencies.py changes the frequencies for long contexts.
Shapes: s sequence, b micro batch, n heads, d head dim, r rotated features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.kernels.rotary import RotaryPair, rotary, rotary_pair
from megatron.model.positions.base import Positions
from megatron.model.positions.rope_frequencies import scaled


class Rotary(Positions):
    """Rotates pair i of position p by the angle p * frequency i.

    frequencies: one for each pair, fp32 [r/2]. factor: multiplies cosines and sines. It has no parameter; the table of
    cosines grows with the longest sequence and is shared by all blocks.
    """

    def __init__(self, frequencies: Tensor, factor: float = 1.0, kernel: RotaryPair = rotary_pair) -> None:
        self.frequencies = frequencies
        self.factor = factor
        self.kernel = kernel
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def for_attention(cls, model: Any, head_dim: int, kernel: RotaryPair) -> Rotary:
        """Builds it from the model section's rotary_pct, rotary_emb_base and rope_scaling."""
        turned = int(head_dim * model.rotary_pct)
        if turned < 2 or turned % 2:
            raise ValueError(f"rotary positions turn pairs of features, and {turned} is not an even number above 0")
        return cls(*scaled(turned, model.rotary_emb_base, model.rope_scaling, model.seq_length), kernel)

    def __call__(self, x: Tensor, offset: int, positions: Tensor | None = None) -> Tensor:
        """Rotates queries or keys [b, n, s, d] whose first position is ``offset``; see base.py."""
        end = offset + x.shape[2]
        cos, sin = self.table(end, x.device)
        if positions is not None:
            return rotary(x, cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))  # of [b, 1, s, r/2]
        return rotary(x, cos[offset:end], sin[offset:end])

    def pair(self, q: Tensor, k: Tensor, offset: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rotates queries and keys together; see base.py.

        Args:
            q: Queries [b, n, s, d].
            k: Keys [b, m, s, d].
            offset: Position of the first token.
            positions: Position of each token instead [b, s].
        """
        cos, sin = self.table(offset + q.shape[2], q.device)
        return self.kernel(q, k, cos, sin, offset, positions)

    def table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines of at least ``length`` positions, fp32 [length, r/2]."""
        known = self._tables.get(device)
        if known is None or known[0].shape[0] < length:
            room = 1 << (length - 1).bit_length()
            positions = torch.arange(room, dtype=torch.float32, device=device)
            angles = torch.outer(positions, self.frequencies.to(device))
            known = (angles.cos() * self.factor, angles.sin() * self.factor)
            self._tables[device] = known
        return known
