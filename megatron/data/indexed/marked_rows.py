"""A memory-mapped array that several ranks fill block by block, and a mark for each block that is on disk.

Ranks write blocks of their own into one file, so files for several hosts are on a disk that they share. They write the
bytes of a block alone, since hosts that map a file of a network disk write pages, also those parts of them that another
host has changed. What has no mark is made when the same command runs again.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


class MarkedRows:
    """The rows of a `.npy` file, [n, ...], and the marks of another one."""

    def __init__(self, rows: Path, marks: Path, *, block: int, writes: bool) -> None:
        """Opens both files. Raises OSError or ValueError where one cannot be read.

        Args:
            rows: file of the rows.
            marks: file of the marks.
            block: rows that are marked together.
            writes: open them for writing.
        """
        self._files = (rows, marks) if writes else None
        self.rows, self._marks, self._block = np.load(rows, mmap_mode="r"), np.load(marks, mmap_mode="r"), block
        if writes:
            for path in (rows, marks):
                path.open("r+b").close()

    @property
    def missing(self) -> list[int]:
        """Numbers of the blocks without a mark."""
        return [int(block) for block in np.flatnonzero(self._marks == 0)]

    def numbers(self, block: int) -> range:
        """Returns the numbers of a block's rows."""
        return range(block * self._block, min((block + 1) * self._block, len(self.rows)))

    def write(self, block: int, values: np.ndarray) -> None:
        """Stores the rows of a block, then marks it. Raises ValueError for another number or shape of rows."""
        assert self._files is not None, "opened for reading"
        own, (rows, marks) = self.numbers(block), self._files
        held = self.rows[own.start : own.stop]
        if values.shape != held.shape:
            raise ValueError(f"a block of {list(held.shape)} is given {list(values.shape)}")
        row = self.rows.strides[0]
        _store(rows, self.rows.offset + own.start * row, np.ascontiguousarray(values, held.dtype).tobytes())
        _store(marks, self._marks.offset + block, b"\x01")


def _store(path: Path, at: int, values: bytes) -> None:
    """Writes bytes into a file and returns when they are on disk."""
    with path.open("r+b", buffering=0) as file:
        left = memoryview(values)
        while left:
            written = os.pwrite(file.fileno(), left, at)
            left, at = left[written:], at + written
        os.fsync(file.fileno())


def create_rows(rows: Path, marks: Path, dtype: np.dtype, shape: tuple[int, ...], *, block: int) -> None:
    """Makes both files, without rows and marks.

    Args:
        rows: file of the rows.
        marks: file of the marks.
        dtype: of the rows.
        shape: of all rows.
        block: rows that are marked together.
    """
    np.lib.format.open_memmap(rows, "w+", dtype, shape).flush()
    np.lib.format.open_memmap(marks, "w+", np.dtype(np.uint8), (-(-shape[0] // block),)).flush()
