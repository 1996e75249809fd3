"""One tensor of a model: layer, name, shape and shard dimension."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

Kind = Literal[
    "word_embedding",
    "position_embedding",
    "norm",
    "weight",
    "bias",
    "expert",
    "expert_bias",
    "buffer",
    "spatial",
    "mixing",
    "head",
    "vocabulary_bias",
    "adapter",
    "expert_adapter",
    "prompt",
]


@dataclass(frozen=True)
class TensorShape:
    """One tensor."""

    layer: int
    """Layer index, as in the checkpoint's file names."""
    name: str
    """Name in its layer, such as "attention.dense.weight"."""
    shape: tuple[int, ...]
    """Global shape."""
    shard_dim: int | None
    """Dimension that tensor parallelism shards; None for a replicated tensor."""
    kind: Kind
    """Kind of the tensor."""
    sections: tuple[int, ...] = ()
    """Sizes along shard_dim that are sharded separately; () for one section."""
    inputs: int = -1
    """Dimension that a product with the matrix sums over."""
    trained: bool = False
    """Whether it is of the frozen model and trained beside adapters."""

    @property
    def key(self) -> str:
        """Its name in the model: `<layer>.<name>`."""
        return f"{self.layer}.{self.name}"

    @property
    def count(self) -> int:
        """Number of elements of the full tensor."""
        return prod(self.shape)

    def local_shape(self, size: int) -> tuple[int, ...]:
        """Returns the shape of a shard of ``size`` ranks. Raises ValueError when the shards are uneven."""
        if self.shard_dim is None:
            return self.shape
        sections = self.sections or (self.shape[self.shard_dim],)
        section_slices(tuple(set(sections)), 0, size)
        rows = sum(sections) // size
        return (*self.shape[: self.shard_dim], rows, *self.shape[self.shard_dim + 1 :])

    def slices(self, rank: int, size: int) -> tuple[tuple[int, int], ...]:
        """Returns the (start, stop) ranges of ``rank`` along ``shard_dim`` of the full tensor, in order."""
        if self.shard_dim is None:
            raise ValueError(f"{self.name} is not sharded by tensor parallelism")
        return section_slices(self.sections or (self.shape[self.shard_dim],), rank, size)


def section_slices(sections: tuple[int, ...], rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """Returns (start, stop) of ``rank``'s slice of each section, for sections in order."""
    ranges = []
    offset = 0
    for section in sections:
        if section % size:
            raise ValueError(f"a section of {section} rows does not divide by {size} tensor-parallel ranks")
        part = section // size
        ranges.append((offset + rank * part, offset + (rank + 1) * part))
        offset += section
    return tuple(ranges)
