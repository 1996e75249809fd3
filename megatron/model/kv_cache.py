"""The cache of generation: memory taken once, filled position by position.

Every row of a batch is a text of its own length. New positions of a row are stored behind the ones it has, so texts of
different lengths grow side by side without padding between their tokens. What is behind a row's length is left over
from padded prompts or from earlier texts; no query may see it.

Blocks without attention keep a state of a fixed size for each row instead, which every position changes. So they must
be told which of the next positions exist (``expect``), and cannot take any back.

Shapes: b batch, m key/value heads of all ranks, t tensor-parallel degree, s new positions, d head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.kernels.decode_attention import Table, choose_decode_attention, native_attention_unavailable


@dataclass(frozen=True)
class CacheSlots:
    """Where s new positions of every row go.

    end: positions that the longest row has afterwards [tokens]. positions: the new ones, [b, s], and mask: which keys a
    query sees, bool [b, 1, s, end], where the rows are of different lengths. Both are None where they are equally long,
    so that the queries are the last positions of all rows. ends: positions that each row has afterwards, int64 [b].
    """

    end: int
    positions: Tensor | None = None
    mask: Tensor | None = None
    ends: Tensor | None = None


def cache_dtype(model: torch.dtype, device: torch.device, head_dim: int) -> torch.dtype:
    """The best type of a cache for a model of that type: torch's attention to one query is fastest in fp32 on a CPU."""
    if device.type != "cpu" or native_attention_unavailable(device, model, head_dim) is None:
        return model
    return torch.float32


class KVCache:
    """Keys and values of every position that the model has already seen.

    dtype: of the memory, which may be a higher precision than the model's; see ``cache_dtype``.
    num_layers: blocks this process runs. first_layer: number of the first of them (in a pipeline, blocks of earlier
    stages come before). kv_heads: heads on this rank, m/t. max_length: positions there is room for [tokens].
    one_query: attention of one new position a row, where there is a kernel for that.
    states: number of a block -> name -> shape of what it keeps of a row, for blocks without attention. prompt:
    positions that a learned prompt takes before the tokens of every row; lengths and max_length count them.
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
        states: Mapping[int, Mapping[str, tuple[int, ...]]] | None = None,
        prompt: int = 0,
    ) -> None:
        shape = (num_layers, 2, batch, kv_heads, max_length, head_dim)
        self.memory = torch.zeros(shape, dtype=dtype, device=device)
        self.decode_kernel = choose_decode_attention(self.memory.device, dtype, head_dim)
        self.first_layer = first_layer
        self.prompt = prompt
        self.lengths = [0] * batch  # positions filled, of each row [tokens]
        self._slots: tuple[int, CacheSlots] | None = None
        self._valid_lengths: list[int] | None = None
        self._states = {
            (block, name): torch.zeros(batch, *one, dtype=torch.float32, device=device)
            for block, shapes in (states or {}).items()
            for name, one in shapes.items()
        }

    @property
    def batch(self) -> int:
        """Rows there is room for."""
        return self.memory.shape[2]

    @property
    def max_length(self) -> int:
        """Positions there is room for [tokens]."""
        return self.memory.shape[4]

    @property
    def length(self) -> int:
        """Positions filled, of the longest row [tokens]."""
        return max(self.lengths)

    def rows(self, first: int, count: int) -> KVCache:
        """A cache that is these rows of this one: it shares the memory and starts with their lengths."""
        part = object.__new__(KVCache)
        part.memory = self.memory[:, :, first : first + count]
        part.first_layer = self.first_layer
        part.prompt = self.prompt
        part.decode_kernel = self.decode_kernel
        part.lengths = self.lengths[first : first + count]
        part._slots = part._valid_lengths = None
        part._states = {key: state[first : first + count] for key, state in self._states.items()}
        return part

    def set_valid_lengths(self, positions: Sequence[int]) -> None:
        """How many of the next positions of each row exist; those behind them are padding. Until ``advance``."""
        self._valid_lengths = list(positions)

    def valid_mask(self, positions: int) -> Tensor | None:
        """Which of that many next positions exist, bool [b, s]; None where all of them do."""
        if self._valid_lengths is None or min(self._valid_lengths) >= positions:
            return None
        coming = torch.tensor(self._valid_lengths, device=self.memory.device)
        return torch.arange(positions, device=self.memory.device) < coming[:, None]

    def state(self, block: int, name: str) -> Tensor:
        """What a block keeps under a name, [b, ...]: zeros for rows that hold nothing yet. Written in place."""
        state = self._states[block, name]
        empty = [row for row, length in enumerate(self.lengths) if length == 0]
        if empty:
            state[empty] = 0
        return state

    def slots(self, positions: int) -> CacheSlots:
        """Where that many new positions go; worked out once for all blocks. IndexError when they do not fit."""
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
        """Store keys and values [b, m/t, s, d] of the next s positions of a block; returns all of its positions so far.

        The lengths stay as they are until ``advance``, so that every block stores at the same place.
        """
        slots = self.slots(keys.shape[2])
        stored = self.memory[block - self.first_layer]  # [2, b, m/t, max, d]
        if slots.positions is None:
            stored[0, :, :, slots.end - keys.shape[2] : slots.end] = keys
            stored[1, :, :, slots.end - keys.shape[2] : slots.end] = values
        else:
            row = torch.arange(self.batch, device=stored.device)[:, None]  # [b, 1]
            stored[0].transpose(1, 2)[row, slots.positions] = keys.transpose(1, 2).to(stored.dtype)  # [b, s, m/t, d]
            stored[1].transpose(1, 2)[row, slots.positions] = values.transpose(1, 2).to(stored.dtype)
        return stored[0, :, :, : slots.end], stored[1, :, :, : slots.end]  # [b, m/t, end, d]

    def attend_decode(self, block: int, q: Tensor, k: Tensor, v: Tensor, table: Table | None) -> Tensor:
        """Stores one new position of every row and attends to it and all before it, with ``one_query``.

        q [b, n/t, d], k and v [b, m/t, d]; table: of the angles that turn q and k, or None. Returns [b, n/t, d].
        """
        ends = self.slots(1).ends
        assert self.decode_kernel is not None and ends is not None, "the caller asks for one_query first"
        keys, values = self.memory[block - self.first_layer]  # [b, m/t, max, d]
        return self.decode_kernel(q, k, v, keys, values, ends, table)

    def advance(self, positions: int) -> None:
        """All blocks have stored these positions."""
        self._valid_lengths = None
        self.set_lengths([length + positions for length in self.lengths])

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say how many positions of each row count: fewer than are stored where the last ones were padding."""
        self.lengths = list(lengths)
        self._slots = None

    def clear(self, row: int) -> None:
        """Forgets a row's numbers too: a mask gives what is behind a text no weight, but 0 times NaN is NaN."""
        self.memory[:, :, row] = 0
        for state in self._states.values():
            state[row] = 0

    def move(self, source: int, target: int) -> None:
        """Copy a row over another one."""
        length = self.lengths[source]
        self.memory[:, :, target, :, :length] = self.memory[:, :, source, :, :length]
        for state in self._states.values():
            state[target] = state[source]
        self.lengths[target] = length
        self._slots = None

    def reset(self) -> None:
        """Forget everything; the memory is kept for the next prompts."""
        self.set_lengths([0] * self.batch)
