"""KV cache of an encoder-decoder: keys and values of the decoder's tokens, and of the encoder's output for each block.

A text is what the encoder reads, its source, and what follows. The token loop counts both; the decoder's tokens are one
more than what follows, since the first one starts it.

Shapes: b batch, m key/value heads of all ranks, t tensor-parallel degree, k encoder tokens, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.model.kv_cache import KVCache


class SourceCache(KVCache):
    """A KVCache of the decoder's blocks, with keys and values of the encoder's output beside it."""

    def __init__(self, num_layers: int, batch: int, kv_heads: int, max_length: int, head_dim: int, **more: Any) -> None:
        """Allocates the memory.

        Args:
            num_layers: blocks of the decoder in this process.
            batch: rows.
            kv_heads: heads on this rank, m/t.
            max_length: most tokens of a source, and of what follows it.
            head_dim: d.
            more: further arguments of a KVCache.
        """
        super().__init__(num_layers, batch, kv_heads, max_length + 1, head_dim, **more)
        self.sources = torch.zeros_like(self.memory)  # [blocks, 2, b, m/t, max, d]
        self.source_lengths = torch.zeros(batch, dtype=torch.int64)  # on the host

    def rows(self, first: int, count: int) -> SourceCache:
        """Returns a cache of these rows: it shares the memory and starts with their lengths."""
        part = super().rows(first, count)
        assert isinstance(part, SourceCache)
        part.sources = self.sources[:, :, first : first + count]
        part.source_lengths = self.source_lengths[first : first + count]
        return part

    def begin(self, positions: int) -> Tensor:
        """Empties the rows for sources of that many tokens with padding; returns their lengths [b], on the host."""
        valid = self._valid_lengths or [positions] * self.batch
        self.source_lengths.copy_(torch.tensor(valid))
        self._valid_lengths = None
        super().set_lengths([0] * self.batch)
        return self.source_lengths

    def set_encoded(self, block: int, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values [b, m/t, k, d] of the encoder's output for a block of the decoder."""
        stored = self.sources[block - self.first_layer]
        stored[0, :, :, : keys.shape[2]] = keys
        stored[1, :, :, : values.shape[2]] = values

    def encoded(self, block: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the encoder's output for a block, [b, m/t, k, d]."""
        stored = self.sources[block - self.first_layer, :, :, :, : self._longest]
        return stored[0], stored[1]

    @property
    def shown(self) -> Tensor | None:
        """Which of the encoder's tokens are not padding, bool [b, k]; None if all are."""
        if int(self.source_lengths.min()) == self._longest:
            return None
        return (torch.arange(self._longest) < self.source_lengths[:, None]).to(self.memory.device)

    def advance(self, positions: int) -> None:
        """Counts these positions of the decoder, which all blocks have stored."""
        self._valid_lengths = None
        super().set_lengths([length + positions for length in self.lengths])

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Sets the length of each row from the tokens that the loop counts: the source's and those that follow it.

        The decoder has one more of those that follow, which starts it. A row of length 0 is empty.
        """
        sources = self.source_lengths.tolist()
        super().set_lengths([text and text - own + 1 for text, own in zip(lengths, sources, strict=True)])

    def clear(self, row: int) -> None:
        """Empties a row and zeroes its memory."""
        super().clear(row)
        self.sources[:, :, row] = 0

    def move(self, source: int, target: int) -> None:
        """Copies a row over another one."""
        super().move(source, target)
        length = int(self.source_lengths[source])
        self.sources[:, :, target, :, :length] = self.sources[:, :, source, :, :length]
        self.source_lengths[target] = length

    @property
    def _longest(self) -> int:
        return int(self.source_lengths.max())
