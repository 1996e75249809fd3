"""Block layouts of the sparse attention kinds: the key blocks that each query block attends to, without torch.

A sequence has blocks of `block` tokens. A layout lists for each row of blocks (queries) the columns (keys) that it
attends to; inside them the causal mask applies. The kinds and their options are those of DeepSpeed's `SparsityConfig`
classes with attention="unidirectional" (deepspeed/ops/sparse_attention/sparsity_config.py, release 0.14), after
arXiv:1904.10509 (fixed, variable), arXiv:2007.14062 (bigbird) and arXiv:2004.05150 (bslongformer). Two things differ,
so that generation with a KV cache equals a full forward pass: the layout of a sequence is a prefix of that of every
longer one (DeepSpeed moves the global blocks of a last, incomplete window), and random blocks are drawn from the row's
own past by (block of the model, head, row) alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

SAMPLED_ROWS = 512
"""The visible fraction is computed from at most this many rows."""


class Rule(Protocol):
    """Columns that a row of blocks attends to; columns after the row are dropped."""

    def __call__(self, row: int, head: int) -> Iterable[int]: ...


@dataclass(frozen=True)
class SlidingWindow:
    """The row's own block and the blocks before it."""

    blocks_before: int
    """Number of blocks before the row."""

    def __call__(self, row: int, head: int) -> Iterable[int]:
        return range(row - self.blocks_before, row + 1)


@dataclass(frozen=True)
class Windows:
    """The blocks of the row's window. Windows follow each other without overlap."""

    sizes: tuple[int, ...]
    """Sizes of the windows [blocks]; the last one repeats."""

    def __call__(self, row: int, head: int) -> Iterable[int]:
        start = 0
        for size in self.sizes:
            if row < start + size:
                return range(start, row + 1)
            start += size
        return range(row - (row - start) % self.sizes[-1], row + 1)


@dataclass(frozen=True)
class WindowGlobals:
    """Global blocks of each window: the last ones for head 0, and earlier ones for the next patterns."""

    window: int
    """Size of a window [blocks]."""
    count: int
    """Global blocks of each window."""
    patterns: int
    """Number of patterns; head h has pattern h % patterns."""

    def __call__(self, row: int, head: int) -> Iterable[int]:
        first = self.window - (1 + head % self.patterns) * self.count
        return [block for start in range(first, row + 1, self.window) for block in range(start, start + self.count)]


@dataclass(frozen=True)
class Columns:
    """Global blocks that every row attends to."""

    ranges: tuple[tuple[int, int], ...]
    """First block and end of each range."""
    rows: bool = False
    """Whether the rows of these blocks attend to everything before them."""

    def __call__(self, row: int, head: int) -> Iterable[int]:
        if self.rows and any(first <= row < end for first, end in self.ranges):
            return range(row + 1)
        return [block for first, end in self.ranges for block in range(first, min(end, row + 1))]


@dataclass(frozen=True)
class RandomBlocks:
    """Blocks drawn from the past of the row, the same in every run."""

    count: int
    """Number of random blocks."""
    number: int
    """Index of the model's transformer block, part of the seed."""

    def __call__(self, row: int, head: int) -> Iterable[int]:
        generator = random.Random(f"{self.number}/{head}/{row}")
        return generator.sample(range(row + 1), min(self.count, row + 1))


@dataclass(frozen=True)
class BlockLayout:
    """Layout of one transformer block."""

    block: int
    """Size of a block [tokens]."""
    rules: tuple[Rule, ...]
    """A row attends to the union of the columns of all rules."""
    per_head: bool = False
    """Whether heads differ."""

    def seen(self, row: int, head: int = 0) -> list[int]:
        """Returns the columns that a row of blocks attends to, its own included, in order."""
        head = head if self.per_head else 0
        return sorted({column for rule in self.rules for column in rule(row, head) if 0 <= column <= row})

    def visible_share(self, length: int) -> float:
        """Returns the query-key pairs that are computed, as a fraction of those of causal attention."""
        rows = -(-length // self.block)
        step = max(1, rows // SAMPLED_ROWS)
        taken = range(step - 1, rows, step)
        return sum(len(self.seen(row)) - 0.5 for row in taken) / sum(row + 0.5 for row in taken)


def visible_share(kind: str, config: Mapping[str, Any] | None, number: int, window: int | None, length: int) -> float:
    """Returns the fraction of the causal query-key pairs that a block of any attention kind computes.

    Args:
        kind: the attention kind; 1.0 for full causal attention.
        config: sparsity_config.
        number: index of the transformer block.
        window: sliding_window_width [tokens].
        length: of the sequence [tokens].
    """
    layout = layout_of(kind, config, number)
    if layout is not None:
        return layout.visible_share(length)
    if window is None or window >= length:
        return 1.0
    return (window * length - window * (window - 1) / 2) / (length * (length + 1) / 2)


def _local(config: Mapping[str, Any], number: int) -> tuple[Rule, ...]:
    blocks = config.get("num_local_blocks", config.get("num_sliding_window_blocks", 4))
    return (SlidingWindow(blocks // 2),)


def _fixed(config: Mapping[str, Any], number: int) -> tuple[Rule, ...]:
    window, count = config.get("num_local_blocks", 4), config.get("num_global_blocks", 1)
    return Windows((window,)), WindowGlobals(window, count, config.get("num_different_global_patterns", 1))


def _variable(config: Mapping[str, Any], number: int) -> tuple[Rule, ...]:
    windows = Windows(tuple(config.get("local_window_blocks", (4,))))
    return windows, _columns(config), RandomBlocks(config.get("num_random_blocks", 0), number)


def _bigbird(config: Mapping[str, Any], number: int) -> tuple[Rule, ...]:
    first = Columns(((0, config.get("num_global_blocks", 1)),))
    return _sliding(config), first, RandomBlocks(config.get("num_random_blocks", 1), number)


def _bslongformer(config: Mapping[str, Any], number: int) -> tuple[Rule, ...]:
    return _sliding(config), _columns(config, rows=True)


def _sliding(config: Mapping[str, Any]) -> Rule:
    return SlidingWindow(config.get("num_sliding_window_blocks", 3) // 2)


def _columns(config: Mapping[str, Any], *, rows: bool = False) -> Rule:
    firsts = config.get("global_block_indices", (0,))
    ends = config.get("global_block_end_indices") or [first + 1 for first in firsts]
    return Columns(tuple(zip(firsts, ends, strict=True)), rows)


_SHARED = frozenset({"block", "different_layout_per_head"})
_RULES: dict[str, tuple[Callable[[Mapping[str, Any], int], tuple[Rule, ...]], frozenset[str]]] = {
    "local": (_local, frozenset({"num_local_blocks", "num_sliding_window_blocks"})),
    "sparse_fixed": (
        _fixed,
        frozenset({"num_local_blocks", "num_global_blocks", "num_different_global_patterns"}),
    ),
    "sparse_variable": (
        _variable,
        frozenset({"num_random_blocks", "local_window_blocks", "global_block_indices", "global_block_end_indices"}),
    ),
    "bigbird": (_bigbird, frozenset({"num_random_blocks", "num_sliding_window_blocks", "num_global_blocks"})),
    "bslongformer": (
        _bslongformer,
        frozenset({"num_sliding_window_blocks", "global_block_indices", "global_block_end_indices"}),
    ),
}

SPARSE_KINDS = tuple(_RULES)
"""The attention kinds that have a layout."""


def options_of(kind: str) -> frozenset[str]:
    """Returns the names in `sparsity_config` that a sparse kind reads."""
    return _RULES[kind][1] | _SHARED


def layout_of(kind: str, config: Mapping[str, Any] | None, number: int) -> BlockLayout | None:
    """Returns the layout of block ``number`` of the model; None for a kind that is not sparse.

    config: `sparsity_config`, with DeepSpeed's defaults for missing names.
    """
    if kind not in _RULES:
        return None
    config = config or {}
    rules = _RULES[kind][0](config, number)
    return BlockLayout(config.get("block", 16), rules, bool(config.get("different_layout_per_head", False)))
