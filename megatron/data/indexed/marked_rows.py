"""A memory-mapped array that several ranks fill block by block, and a mark for each block that is on disk.

Ranks write blocks of their own into one file, so files for several hosts are on a disk that they share. What has no
mark is made when the same command runs again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
        mode: Any = "r+" if writes else "r"
        self.rows = np.load(rows, mmap_mode=mode)
        self._marks, self._block = np.load(marks, mmap_mode=mode), block

    @property
    def missing(self) -> list[int]:
        """Numbers of the blocks without a mark."""
        return [int(block) for block in np.flatnonzero(self._marks == 0)]

    def numbers(self, block: int) -> range:
        """Returns the numbers of a block's rows."""
        return range(block * self._block, min((block + 1) * self._block, len(self.rows)))

    def write(self, block: int, values: np.ndarray) -> None:
        """Stores the rows of a block, then marks it."""
        own = self.numbers(block)
        self.rows[own.start : own.stop] = values
        self.rows.flush()
        self._marks[block] = 1
        self._marks.flush()


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
