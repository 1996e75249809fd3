"""Two loops in which each turn depends on the one before, compiled by numba where it is installed (the extra `fast`).

Numpy has no words for them. Each has a twin that needs nothing: blend.greedy_order and index_map.first_tokens, which
the tests compare. Numba takes half a second to load and, the first time on a machine, seconds to compile; the result is
kept in a file. So short work is left to the twins.
"""

from __future__ import annotations

from importlib.util import find_spec

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
