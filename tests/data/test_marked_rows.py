"""Rows that several processes fill block by block: what each writes, and what is marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed.marked_rows import MarkedRows, create_rows

SHAPE, BLOCK = (10, 3), 4


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    found = tmp_path / "rows.npy", tmp_path / "done.npy"
    create_rows(*found, np.dtype(np.float32), SHAPE, block=BLOCK)
    return found


def test_blocks_are_stored_and_marked(files: tuple[Path, Path]) -> None:
    values = np.arange(30, dtype=np.float64).reshape(SHAPE)
    first, second = (MarkedRows(*files, block=BLOCK, writes=True) for _ in range(2))
    assert not first.rows.flags.writeable  # a page that is mapped for writing is written with what others have in it
    for own, block in ((first, 2), (second, 0), (first, 1)):
        own.write(block, values[own.numbers(block)])
        assert block not in MarkedRows(*files, block=BLOCK, writes=False).missing
    assert MarkedRows(*files, block=BLOCK, writes=False).missing == first.missing == []
    np.testing.assert_array_equal(np.load(files[0]), values.astype(np.float32))
    np.testing.assert_array_equal(np.load(files[1]), [1, 1, 1])


def test_only_its_bytes_change(files: tuple[Path, Path]) -> None:
    before = files[0].read_bytes()
    MarkedRows(*files, block=BLOCK, writes=True).write(1, np.ones((BLOCK, 3)))
    after, row = files[0].read_bytes(), 3 * 4
    start = len(before) - 10 * row + BLOCK * row
    assert (after[:start], after[start + BLOCK * row :]) == (before[:start], before[start + BLOCK * row :])
    assert after[start : start + BLOCK * row] == np.ones((BLOCK, 3), np.float32).tobytes()


def test_a_block_of_another_size_is_refused(files: tuple[Path, Path]) -> None:
    stored = MarkedRows(*files, block=BLOCK, writes=True)
    with pytest.raises(ValueError, match=r"a block of \[2, 3\] is given \[4, 3\]"):
        stored.write(2, np.zeros((4, 3)))
    assert stored.missing == [0, 1, 2]
