"""The key/value cache of generation: memory taken once, filled position by position.

Shapes: b batch, m key/value heads of all ranks, t tensor-parallel degree, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every position that the model has already seen.

    num_layers: blocks this process runs. first_layer: number of the first of them (in a pipeline, blocks of earlier
    stages come before). kv_heads: heads on this rank, m/t. max_length: positions there is room for [tokens].
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        first_layer: int = 0,
    ) -> None:
        shape = (num_layers, 2, batch, kv_heads, max_length, head_dim)
        self.memory = torch.zeros(shape, dtype=dtype, device=device)
        self.first_layer = first_layer
        self.length = 0  # positions filled [tokens]

    @property
    def max_length(self) -> int:
        """Positions there is room for [tokens]."""
        return self.memory.shape[4]

    def update(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [b, m/t, s, d] of the next s positions of a block; returns all of its positions so far.

        ``length`` stays as it is until ``advance``, so that every block stores at the same place. IndexError when full.
        """
        end = self.length + keys.shape[2]
        if end > self.max_length:
            raise IndexError(f"{end} positions do not fit a cache of {self.max_length}")
        stored = self.memory[block - self.first_layer]  # [2, b, m/t, max, d]
        stored[0, :, :, self.length : end] = keys
        stored[1, :, :, self.length : end] = values
        return stored[0, :, :, :end], stored[1, :, :, :end]  # [b, m/t, length + s, d]

    def advance(self, positions: int) -> None:
        """All blocks have stored these positions."""
        self.length += positions

    def reset(self) -> None:
        """Forget everything; the memory is kept for the next prompt."""
        self.length = 0
