"""Random numbers of C++'s std::mt19937 and std::mt19937_64, from which the public order of masked samples follows.

The 32-bit generator is numpy's. The 64-bit one is computed here, a block of 312 numbers at a time. Source: Matsumoto
and Nishimura 1998; Nishimura 2000 for 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_STATE, _MIDDLE = 312, 156
_MASK = (1 << 64) - 1
_TWIST = np.uint64(0xB5026F5AA96619E9)
_UPPER, _LOWER = np.uint64(0xFFFFFFFF80000000), np.uint64(0x7FFFFFFF)
_ONE = np.uint64(1)


class Draws32:
    """The numbers of std::mt19937(seed), in order."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.RandomState(seed % (1 << 32))
        self._ahead = np.empty(0, np.int64)

    def peek(self, count: int) -> np.ndarray:
        """Returns the next numbers, int64 [count], without taking them."""
        missing = count - len(self._ahead)
        if missing > 0:
            more = self._generator.randint(0, 1 << 32, missing, dtype=np.uint32)
            self._ahead = np.concatenate([self._ahead, more.astype(np.int64)])
        return self._ahead[:count]

    def take(self, count: int) -> None:
        """Takes numbers that were seen by `peek`."""
        self._ahead = self._ahead[count:]


def draws_64(seed: int, count: int) -> np.ndarray:
    """Returns the first numbers of std::mt19937_64(seed), uint64 [count]."""
    blocks = [block for _, block in zip(range(-(-count // _STATE)), _blocks(seed), strict=False)]
    return np.concatenate([*blocks, np.empty(0, np.uint64)])[:count]


def _blocks(seed: int) -> Iterator[np.ndarray]:
    word = seed & _MASK
    words = [word]
    for number in range(1, _STATE):
        word = (6364136223846793005 * (word ^ (word >> 62)) + number) & _MASK
        words.append(word)
    state = np.array(words, np.uint64)
    while True:
        state = _next_state(state)
        found = state ^ ((state >> np.uint64(29)) & np.uint64(0x5555555555555555))
        found ^= (found << np.uint64(17)) & np.uint64(0x71D67FFFEDA60000)
        found ^= (found << np.uint64(37)) & np.uint64(0xFFF7EEE000000000)
        yield found ^ (found >> np.uint64(43))


def _next_state(state: np.ndarray) -> np.ndarray:
    """Each word follows from two neighbours and the word half a state further on, so the halves come in turn."""
    made = np.empty_like(state)
    made[:_MIDDLE] = state[_MIDDLE:] ^ _twisted(state[:_MIDDLE], state[1 : _MIDDLE + 1])
    made[_MIDDLE:-1] = made[: _MIDDLE - 1] ^ _twisted(state[_MIDDLE:-1], state[_MIDDLE + 1 :])
    made[-1:] = made[_MIDDLE - 1 : _MIDDLE] ^ _twisted(state[-1:], made[:1])
    return made


def _twisted(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    joined = (upper & _UPPER) | (lower & _LOWER)
    return (joined >> _ONE) ^ np.where(joined & _ONE, _TWIST, np.uint64(0))
