"""One tensor of a model: where it lives, what it is called, how large it is and how tensor parallelism cuts it."""

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
    "spatial",
    "mixing",
    "head",
    "adapter",
    "prompt",
]


@dataclass(frozen=True)
class TensorShape:
    """One tensor: where it lives, what it is called, how large it is and how it is cut."""

    layer: int  # index in the layer plan, and in the checkpoint's file names
    name: str  # inside its layer, such as "attention.dense.weight"
    shape: tuple[int, ...]  # global shape
    shard_dim: int | None  # dimension cut by tensor parallelism; None: every rank holds all of it
    kind: Kind
    sections: tuple[int, ...] = ()  # sizes along shard_dim that are cut one by one; (): one section
    inputs: int = -1  # dimension that a product with the matrix sums over

    @property
    def key(self) -> str:
        """Its name in the whole model: `<layer>.<name>`."""
        return f"{self.layer}.{self.name}"

    @property
    def count(self) -> int:
        """Number of elements of the global tensor."""
        return prod(self.shape)

    def local_shape(self, size: int) -> tuple[int, ...]:
        """The shape one rank of ``size`` tensor-parallel ranks holds. ValueError where the cut is uneven."""
        if self.shard_dim is None:
            return self.shape
        sections = self.sections or (self.shape[self.shard_dim],)
        section_slices(tuple(set(sections)), 0, size)
        rows = sum(sections) // size
        return (*self.shape[: self.shard_dim], rows, *self.shape[self.shard_dim + 1 :])

    def slices(self, rank: int, size: int) -> tuple[tuple[int, int], ...]:
        """(start, stop) ranges along ``shard_dim`` of the global tensor that ``rank`` holds, in its order."""
        if self.shard_dim is None:
            raise ValueError(f"{self.name} is not cut by tensor parallelism")
        return section_slices(self.sections or (self.shape[self.shard_dim],), rank, size)


def section_slices(sections: tuple[int, ...], rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of rank ``rank``'s slice of each section, where the sections lie one after another."""
    ranges = []
    offset = 0
    for section in sections:
        if section % size:
            raise ValueError(f"a section of {section} rows does not divide by {size} tensor-parallel ranks")
        part = section // size
        ranges.append((offset + rank * part, offset + (rank + 1) * part))
        offset += section
    return tuple(ranges)
