"""Which blocks of keys a block of queries sees, for every sparse kind of attention, without torch.

The sequence is cut into blocks of `block` tokens. A layout says for each row of blocks (queries) which columns (keys)
it sees; inside them a token sees no later token. The kinds and their options are those of DeepSpeed's `SparsityConfig`
classes with attention="unidirectional" (deepspeed/ops/sparse_attention/sparsity_config.py, release 0.14), after
arXiv:1904.10509 (fixed, variable), arXiv:2007.14062 (bigbird) and arXiv:2004.05150 (bslongformer). Two things differ,
so that a cached text sees what it saw when it was run whole: the layout of a sequence is a part of that of every
longer one (DeepSpeed moves the global blocks of a last, incomplete window), and random blocks are drawn from the row's
own past by (block of the model, head, row) alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

SAMPLED_ROWS = 512
"""The share of visible positions is taken from at most this many rows."""


class Rule(Protocol):
    """Some columns that a row of blocks sees; later columns among them do not count."""

    def __call__(self, row: int, head: int) -> Iterable[int]: ...


@dataclass(frozen=True)
class Around:
    """The row's own block and the `reach` blocks before it."""

    reach: int

    def __call__(self, row: int, head: int) -> Iterable[int]:
        return range(row - self.reach, row + 1)


@dataclass(frozen=True)
class Windows:
    """The blocks of the row's window: windows of these sizes lie one after another, the last size again and again."""

    sizes: tuple[int, ...]

    def __call__(self, row: int, head: int) -> Iterable[int]:
        start = 0
        for size in self.sizes:
            if row < start + size:
                return range(start, row + 1)
            start += size
        return range(row - (row - start) % self.sizes[-1], row + 1)


@dataclass(frozen=True)
class Representatives:
    """`count` blocks of each window of `window` blocks: the last ones, or for head h those before by h % patterns."""

    window: int
    count: int
    patterns: int

    def __call__(self, row: int, head: int) -> Iterable[int]:
        first = self.window - (1 + head % self.patterns) * self.count
        return [block for start in range(first, row + 1, self.window) for block in range(start, start + self.count)]


@dataclass(frozen=True)
class Columns:
    """These blocks, whatever the row. rows: and the rows of these blocks see everything before them."""

    ranges: tuple[tuple[int, int], ...]
    rows: bool = False

    def __call__(self, row: int, head: int) -> Iterable[int]:
        if self.rows and any(first <= row < end for first, end in self.ranges):
            return range(row + 1)
        return [block for first, end in self.ranges for block in range(first, min(end, row + 1))]


@dataclass(frozen=True)
class Drawn:
    """`count` blocks drawn from the past of the row, the same in every run. number: the block of the model."""

    count: int
    number: int

    def __call__(self, row: int, head: int) -> Iterable[int]:
        draws = random.Random(f"{self.number}/{head}/{row}")
        return draws.sample(range(row + 1), min(self.count, row + 1))


@dataclass(frozen=True)
class BlockLayout:
    """block: [tokens]. rules: a row sees what any of them names. per_head: whether heads differ."""

    block: int
    rules: tuple[Rule, ...]
    per_head: bool = False

    def seen(self, row: int, head: int = 0) -> list[int]:
        """The columns that a row of blocks sees, its own included, in order."""
        head = head if self.per_head else 0
        return sorted({column for rule in self.rules for column in rule(row, head) if 0 <= column <= row})

    def visible_share(self, length: int) -> float:
        """Pairs of a token and one that it sees, of all pairs of a token and one not after it [fraction]."""
        rows = -(-length // self.block)
        step = max(1, rows // SAMPLED_ROWS)
        taken = range(step - 1, rows, step)
        return sum(len(self.seen(row)) - 0.5 for row in taken) / sum(row + 0.5 for row in taken)


def visible_share(kind: str, config: Mapping[str, Any] | None, number: int, window: int | None, length: int) -> float:
    """The same share for block ``number`` of the model, of any kind of attention; 1 for one that sees everything.

    config: sparsity_config. window: sliding_window_width [tokens]. length: of the sequence [tokens].
    """
    layout = layout_of(kind, config, number)
    if layout is not None:
        return layout.visible_share(length)
    if window is None or window >= length:
        return 1.0
    return (window * length - window * (window - 1) / 2) / (length * (length + 1) / 2)


def _local(config: Mapping[str, Any], number: int) -> tuple[Rule, ...]:
    blocks = config.get("num_local_blocks", config.get("num_sliding_window_blocks", 4))
    return (Around(blocks // 2),)


def _fixed(config: Mapping[str, Any], number: int) -> tuple[Rule, ...]:
    window, count = config.get("num_local_blocks", 4), config.get("num_global_blocks", 1)
    return Windows((window,)), Representatives(window, count, config.get("num_different_global_patterns", 1))


def _variable(config: Mapping[str, Any], number: int) -> tuple[Rule, ...]:
    windows = Windows(tuple(config.get("local_window_blocks", (4,))))
    return windows, _columns(config), Drawn(config.get("num_random_blocks", 0), number)


def _bigbird(config: Mapping[str, Any], number: int) -> tuple[Rule, ...]:
    first = Columns(((0, config.get("num_global_blocks", 1)),))
    return _sliding(config), first, Drawn(config.get("num_random_blocks", 1), number)


def _bslongformer(config: Mapping[str, Any], number: int) -> tuple[Rule, ...]:
    return _sliding(config), _columns(config, rows=True)


def _sliding(config: Mapping[str, Any]) -> Rule:
    return Around(config.get("num_sliding_window_blocks", 3) // 2)


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
"""The kinds of attention that a layout describes."""


def options_of(kind: str) -> frozenset[str]:
    """The names in `sparsity_config` that a sparse kind reads."""
    return _RULES[kind][1] | _SHARED


def layout_of(kind: str, config: Mapping[str, Any] | None, number: int) -> BlockLayout | None:
    """The layout of block ``number`` of the model, or None for a kind that sees everything before it.

    config: the `sparsity_config` of the configuration; DeepSpeed's defaults where it says nothing.
    """
    if kind not in _RULES:
        return None
    config = config or {}
    rules = _RULES[kind][0](config, number)
    return BlockLayout(config.get("block", 16), rules, bool(config.get("different_layout_per_head", False)))
