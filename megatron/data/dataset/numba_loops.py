"""Loops in which each turn depends on the one before, compiled by numba where it is installed (the extra `fast`).

Numpy has no words for them. Each has a twin that needs nothing: blend.greedy_order, index_map.first_tokens, and for the
rows of sentences the loop itself, which the tests compare. Numba takes half a second to load and, the first time on a
machine, seconds to compile; the result is kept in a file. So short work is left to the twins.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np


def set_dtype(sets: int) -> np.dtype:
    """The dtype of the numbers of so many data sets."""
    return np.dtype(np.uint8 if sets <= 1 << 8 else np.uint16)


def worth_compiling(turns: int, least: int) -> bool:
    """Whether a loop of so many turns gains from it, and numba is there."""
    return turns >= least and find_spec("numba") is not None


def greedy_order(weights: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Which set each sample comes from [samples], and its number in it, int64 [samples]; see blend.py."""
    from numba import njit

    sets, numbers = np.empty(samples, set_dtype(len(weights))), np.empty(samples, np.int64)
    njit(_fill_order, cache=True, nogil=True)(weights, np.zeros(len(weights), np.int64), sets, numbers)
    return sets, numbers


def first_tokens(sizes: np.ndarray, order: np.ndarray, seq_length: int, starts: np.ndarray) -> None:
    """Fills starts [n + 1, 2] with the position in the order and the offset of each sample's first token.

    Args:
        sizes: Of all documents [tokens].
        order: Of the documents in the row; see index_map.py.
        seq_length: Length of a sample [tokens].
        starts: The array to fill, [samples + 1, 2].
    """
    from numba import njit

    njit(_fill_starts, cache=True, nogil=True)(sizes, order, seq_length, starts)


def sentence_rows(
    firsts: np.ndarray,
    ends: np.ndarray,
    sizes: np.ndarray,
    numbers: np.ndarray,
    ratio: int,
    max_length: int,
    least: int,
    rows: np.ndarray,
) -> tuple[int, int]:
    """Fills the rows of samples of sentences; returns how many there are, and how many random numbers they took.

    Args:
        firsts: First sentence of each document.
        ends: Sentence after the last one of each document.
        sizes: Length of each sentence [tokens].
        numbers: Random numbers of 32 bits, as many as rows and documents at least.
        ratio: One sample in so many is short; 0 for none.
        max_length: Longest target [tokens].
        least: Sentences that a sample needs.
        rows: The array to fill, [sentences, 3]; see sentence_map.py.
    """
    from numba import njit

    count, used = njit(fill_rows, cache=True, nogil=True)(firsts, ends, sizes, numbers, ratio, max_length, least, rows)
    return int(count), int(used)


def block_rows(
    firsts: np.ndarray, ends: np.ndarray, sizes: np.ndarray, targets: np.ndarray, least: int, rows: np.ndarray
) -> int:
    """Fills the rows of blocks of sentences; returns how many there are.

    Args:
        firsts: First sentence of each document.
        ends: Sentence after the last one of each document.
        sizes: Length of each sentence [tokens].
        targets: Length of a block of each document [tokens].
        least: Sentences that a block needs.
        rows: The array to fill, [sentences, 4]; see block_map.py.
    """
    from numba import njit

    return int(njit(fill_blocks, cache=True, nogil=True)(firsts, ends, sizes, targets, least, rows))


def fill_blocks(firsts: Any, ends: Any, sizes: Any, targets: Any, least: int, rows: np.ndarray) -> int:
    """The loop of `block_rows`, on arrays or lists.

    Args:
        firsts: As there.
        ends: As there.
        sizes: As there.
        targets: As there.
        least: As there.
        rows: As there.
    """
    count = 0
    for document in range(len(firsts)):
        start, end, length = firsts[document], ends[document], 0
        for sentence in range(start, end):
            length += sizes[sentence]
            left = end - sentence - 1
            enough = left >= least and sentence + 1 - start >= least
            if left == 0 or (length >= targets[document] and enough):
                rows[count, 0] = start
                rows[count, 1] = sentence + 1
                rows[count, 2] = document
                rows[count, 3] = count
                count += 1
                start, length = sentence + 1, 0
    return count


def swap_rows(order: np.ndarray, partners: np.ndarray) -> None:
    """Swaps each entry of the order, from the last one on, with its partner; see sentence_map.py."""
    from numba import njit

    njit(swap, cache=True, nogil=True)(order, partners)


def fill_rows(
    firsts: Any, ends: Any, sizes: Any, numbers: Any, ratio: int, max_length: int, least: int, rows: np.ndarray
) -> tuple[int, int]:
    """The loop of `sentence_rows`, on arrays or lists.

    Args:
        firsts: As there.
        ends: As there.
        sizes: As there.
        numbers: As there.
        ratio: As there.
        max_length: As there.
        least: As there.
        rows: As there.
    """
    count = used = 0
    for document in range(len(firsts)):
        start, end = firsts[document], ends[document]
        target, length = -1, 0
        for sentence in range(start, end):
            if target < 0:
                target = max_length
                if ratio > 0:
                    if numbers[used] % ratio == 0:
                        target = 2 + numbers[used] % (max_length - 1)
                    used += 1
            length += sizes[sentence]
            left = end - sentence - 1
            if left == 0 or (length >= target and left > 1 and sentence + 1 - start >= least):
                rows[count, 0] = start
                rows[count, 1] = sentence + 1
                rows[count, 2] = target
                count += 1
                start, target, length = sentence + 1, -1, 0
        if ratio > 0:
            used += 1  # the public loop draws the target of a sample that the document has no sentences for
    return count, used


def swap(order: Any, partners: Any) -> None:
    """The loop of `swap_rows`, on arrays or lists."""
    last = len(order) - 1
    for step in range(last):
        here, there = last - step, partners[step]
        held = order[here]
        order[here] = order[there]
        order[there] = held


def _fill_order(weights: np.ndarray, counts: np.ndarray, sets: np.ndarray, numbers: np.ndarray) -> None:
    for sample in range(len(sets)):
        seen = max(float(sample), 1.0)
        chosen, largest = 0, weights[0] * seen - counts[0]
        for candidate in range(1, len(weights)):
            behind = weights[candidate] * seen - counts[candidate]
            if behind > largest:
                chosen, largest = candidate, behind
        sets[sample] = chosen
        numbers[sample] = counts[chosen]
        counts[chosen] += 1


def _fill_starts(sizes: np.ndarray, order: np.ndarray, seq_length: int, starts: np.ndarray) -> None:
    row, offset = 0, 0  # offset: of the next sample's first token, from the start of the document at hand
    for position in range(len(order)):
        size = sizes[order[position]]
        while offset < size and row < len(starts):
            starts[row, 0] = position
            starts[row, 1] = offset
            row += 1
            offset += seq_length
        offset -= size
