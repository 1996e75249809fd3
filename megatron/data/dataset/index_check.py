"""Whether an index map that was read from files holds what such a map must hold.

A file can have the right size and damaged contents: a copy that was interrupted, a file system that lost blocks. Such a
map would repeat a few samples without an error. Long arrays are checked in blocks that are spread over their length, so
that a start reads a bounded part of them.
"""

from __future__ import annotations

import numpy as np

from megatron.data.dataset.index_map import IndexMap

FULL_CHECK = 1 << 22
"""Entries up to which all of an array is checked."""
BLOCKS, BLOCK = 64, 1 << 14
"""Number and length of the blocks of a longer array."""


def is_intact(found: IndexMap, usable: np.ndarray) -> bool:
    """Returns whether every order is one and the samples advance.

    Args:
        found: The map, of the right shapes.
        usable: The documents of a pass, ascending.
    """
    return (
        _is_order(found.shuffle, np.arange(len(found.shuffle)), passes=1)
        and _is_order(found.documents, usable, passes=found.epochs)
        and _advances(found)
    )


def _part(array: np.ndarray) -> np.ndarray:
    """The array, or blocks of it in their order."""
    if len(array) <= FULL_CHECK:
        return np.asarray(array)
    starts = np.linspace(0, len(array) - BLOCK, BLOCKS, dtype=np.int64)
    return np.concatenate([array[start : start + BLOCK] for start in starts.tolist()])


def _is_order(array: np.ndarray, values: np.ndarray, *, passes: int) -> bool:
    """Whether the entries are those values, none of them more often than the passes."""
    part = _part(array)
    if not len(part):
        return True
    found, counts = np.unique(part, return_counts=True)
    known = np.searchsorted(values, found)
    inside = bool(known[-1] < len(values)) and bool((values[known] == found).all())
    return inside and int(counts.max()) <= passes


def _advances(found: IndexMap) -> bool:
    """Whether each sample starts after the one before, within the documents."""
    part = _part(found.samples).astype(np.int64)
    documents, offsets = part[:, 0], part[:, 1]
    further = np.diff(documents)
    grows = (further > 0) | ((further == 0) & (np.diff(offsets) > 0))
    return bool(grows.all()) and offsets[0] == 0 and int(documents.max()) <= len(found.documents)
