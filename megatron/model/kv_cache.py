"""Preallocated KV cache.

Every row of a batch is a sequence of its own length. New positions of a row are stored after its last one, so sequences
of different lengths grow without padding between their tokens. Values after a row's length are left over from padded
prompts or from earlier sequences; no query may see them.

Latent attention stores one latent and one rotated key for all heads in place of keys and values of each: a row of r + p
numbers a token.

Blocks without attention have a state of fixed size for each row instead, which every position changes. So they need the
number of valid new positions (``set_valid_lengths``), and cannot discard any afterwards.

Shapes: b batch, m key/value heads of all ranks, t tensor-parallel degree, s new positions, d head dim, r rank of a
latent, p rotated features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.kernels.decode_attention import Table, choose_decode_attention, native_attention_unavailable


@dataclass(frozen=True)
class CacheSlots:
    """Slots of s new positions of every row."""

    end: int
    """Positions of the longest row afterwards [tokens]."""
    positions: Tensor | None = None
    """New positions, [b, s]; None if all rows have the same length."""
    mask: Tensor | None = None
    """Keys that a query sees, bool [b, 1, s, end]; None if all rows have the same length."""
    ends: Tensor | None = None
    """Positions of each row afterwards, int64 [b]."""


def cache_dtype(model: torch.dtype, device: torch.device, head_dim: int) -> torch.dtype:
    """Returns the best type of the cache for a model of that type: decode attention of torch is fastest in fp32 on a
    CPU.
    """
    if device.type != "cpu" or native_attention_unavailable(device, model, head_dim) is None:
        return model
    return torch.float32


class KVCache:
    """Keys and values of every position so far."""

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
        attending: Sequence[int] | None = None,
        states: Mapping[int, Mapping[str, tuple[int, ...]]] | None = None,
        prompt: int = 0,
        latents: bool = False,
    ) -> None:
        """Allocates the memory.

        Args:
            num_layers: blocks with attention in this process.
            batch: rows.
            kv_heads: heads on this rank, m/t.
            max_length: capacity of a row [tokens].
            head_dim: d.
            dtype: type of the memory, which may be a higher precision than the model's; see ``cache_dtype``.
            device: device of the memory.
            first_layer: number of the first block in this process.
            attending: numbers of the blocks with attention, of which there are num_layers; None for blocks in a row.
            states: block -> name -> shape of the state of a row, for blocks without attention.
            prompt: positions of a soft prompt before the tokens of every row; lengths and max_length count them.
            latents: true for latents in place of keys and values; kv_heads is 1 and head_dim r + p then.
        """
        shape = (num_layers, 1 if latents else 2, batch, kv_heads, max_length, head_dim)
        self.memory = torch.zeros(shape, dtype=dtype, device=device)
        self.decode_kernel = None if latents else choose_decode_attention(self.memory.device, dtype, head_dim)
        self.first_layer = first_layer
        self._indices = None if attending is None else {block: index for index, block in enumerate(attending)}
        self.prompt = prompt
        self.lengths = [0] * batch  # length of each row [tokens]
        self._slots: tuple[int, CacheSlots] | None = None
        self._valid_lengths: list[int] | None = None
        self._states = {
            (block, name): torch.zeros(batch, *one, dtype=torch.float32, device=device)
            for block, shapes in (states or {}).items()
            for name, one in shapes.items()
        }

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.memory.shape[2]

    @property
    def max_length(self) -> int:
        """Capacity of a row [tokens]."""
        return self.memory.shape[4]

    @property
    def length(self) -> int:
        """Positions of the longest row [tokens]."""
        return max(self.lengths)

    def _index(self, block: int) -> int:
        """Returns the index of a block in the memory."""
        return block - self.first_layer if self._indices is None else self._indices[block]

    def rows(self, first: int, count: int) -> KVCache:
        """Returns a cache of these rows: it shares the memory and starts with their lengths."""
        part = object.__new__(type(self))
        part.memory = self.memory[:, :, first : first + count]
        part.first_layer = self.first_layer
        part._indices = self._indices
        part.prompt = self.prompt
        part.decode_kernel = self.decode_kernel
        part.lengths = self.lengths[first : first + count]
        part._slots = part._valid_lengths = None
        part._states = {key: state[first : first + count] for key, state in self._states.items()}
        return part

    def set_valid_lengths(self, positions: Sequence[int]) -> None:
        """Sets how many of the next positions of each row are valid; the others are padding. Until ``advance``."""
        self._valid_lengths = list(positions)

    def valid_mask(self, positions: int) -> Tensor | None:
        """Returns which of that many next positions are valid, bool [b, s]; None if all are."""
        if self._valid_lengths is None or min(self._valid_lengths) >= positions:
            return None
        coming = torch.tensor(self._valid_lengths, device=self.memory.device)
        return torch.arange(positions, device=self.memory.device) < coming[:, None]

    def state(self, block: int, name: str) -> Tensor:
        """Returns a block's state by name, [b, ...]: zeros for empty rows. Written in place."""
        state = self._states[block, name]
        empty = [row for row, length in enumerate(self.lengths) if length == 0]
        if empty:
            state[empty] = 0
        return state

    def slots(self, positions: int) -> CacheSlots:
        """Returns the slots of that many new positions, computed once for all blocks. IndexError if they do not fit."""
        if self._slots is None or self._slots[0] != positions:
            self._slots = (positions, self._compute_slots(positions))
        return self._slots[1]

    def _compute_slots(self, positions: int) -> CacheSlots:
        end = self.length + positions
        if end > self.max_length:
            raise IndexError(f"{end} positions do not fit a cache of {self.max_length}")
        ends = torch.tensor([length + positions for length in self.lengths])
        if min(self.lengths) == self.length:
            return CacheSlots(end, ends=ends)
        device = self.memory.device
        starts = torch.tensor(self.lengths, device=device)
        at = starts[:, None] + torch.arange(positions, device=device)  # [b, s]
        return CacheSlots(end, at, (torch.arange(end, device=device) <= at[:, :, None])[:, None], ends)

    def update(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values [b, m/t, s, d] of the next s positions of a block; returns all of its positions so
        far.

        The lengths change at ``advance`` only, so that every block uses the same slots.
        """
        slots = self.slots(keys.shape[2])
        stored = self.memory[self._index(block)]  # [2, b, m/t, max, d]
        if slots.positions is None:
            stored[0, :, :, slots.end - keys.shape[2] : slots.end] = keys
            stored[1, :, :, slots.end - keys.shape[2] : slots.end] = values
        else:
            row = torch.arange(self.batch, device=stored.device)[:, None]  # [b, 1]
            stored[0].transpose(1, 2)[row, slots.positions] = keys.transpose(1, 2).to(stored.dtype)  # [b, s, m/t, d]
            stored[1].transpose(1, 2)[row, slots.positions] = values.transpose(1, 2).to(stored.dtype)
        return stored[0, :, :, : slots.end], stored[1, :, :, : slots.end]  # [b, m/t, end, d]

    def update_latents(self, block: int, latents: Tensor) -> Tensor:
        """Stores latents and rotated keys [b, s, r + p] of the next s positions of a block; returns those of all of its
        positions so far, [b, end, r + p].
        """
        slots, length = self.slots(latents.shape[1]), latents.shape[1]
        stored = self.memory[self._index(block), 0, :, 0]  # [b, max, r + p]
        if slots.positions is None:
            stored[:, slots.end - length : slots.end] = latents
        else:
            row = torch.arange(self.batch, device=stored.device)[:, None]  # [b, 1]
            stored[row, slots.positions] = latents.to(stored.dtype)
        return stored[:, : slots.end]

    def attend_decode(self, block: int, q: Tensor, k: Tensor, v: Tensor, table: Table | None) -> Tensor:
        """Stores one new position of every row and attends to it and all before it, with ``decode_kernel``.

        Returns [b, n/t, d].

        Args:
            block: number of the block.
            q: queries [b, n/t, d].
            k: keys [b, m/t, d].
            v: values [b, m/t, d].
            table: cosines and sines for q and k, or None.
        """
        ends = self.slots(1).ends
        assert self.decode_kernel is not None and ends is not None, "the caller asks for one_query first"
        keys, values = self.memory[self._index(block)]  # [b, m/t, max, d]
        return self.decode_kernel(q, k, v, keys, values, ends, table)

    def advance(self, positions: int) -> None:
        """Counts these positions, which all blocks have stored."""
        self._valid_lengths = None
        self.set_lengths([length + positions for length in self.lengths])

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Sets the length of each row; smaller than what is stored if the last positions were padding."""
        self.lengths = list(lengths)
        self._slots = None

    def clear(self, row: int) -> None:
        """Empties a row and zeroes its memory: a mask gives old values no weight, but 0 times NaN is NaN."""
        self.memory[:, :, row] = 0
        for state in self._states.values():
            state[row] = 0

    def move(self, source: int, target: int) -> None:
        """Copies a row over another one."""
        length = self.lengths[source]
        self.memory[:, :, target, :, :length] = self.memory[:, :, source, :, :length]
        for state in self._states.values():
            state[target] = state[source]
        self.lengths[target] = length
        self._slots = None

    def reset(self) -> None:
        """Empties all rows; the memory is reused."""
        self.set_lengths([0] * self.batch)
