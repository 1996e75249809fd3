"""Draw from several data sets by weight, in the public order.

Sample i comes from the set that is furthest behind its share: the one with the largest weight * max(i, 1) - count,
the first of them on a tie. Nothing comes from a set of weight 0, which would be first on a tie at sample 1. Within a
set, samples come in the set's own order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron.data.dataset import numba_loops
from megatron.data.dataset.gpt_dataset import Origin, SampleExtras, Samples

# Each set is asked for a little more than its share, since the greedy order may run ahead of it.
MARGIN = 1.005
COMPILED_FROM = 500_000  # samples
MANY_SETS = 64  # from here on comparing them in numpy is faster than one by one


def blend_order(weights: Sequence[float], samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Which set each sample comes from, uint8 or uint16 [samples], and its number in that set, int64 [samples].

    weights: share of each set [fraction], together 1; at most 65,536 sets.
    """
    drawn = [number for number, weight in enumerate(weights) if weight > 0]
    if 0 < len(drawn) < len(weights):
        sets, numbers = blend_order([weights[number] for number in drawn], samples)
        return np.array(drawn, numba_loops.set_dtype(len(weights)))[sets], numbers
    if numba_loops.worth_compiling(samples, COMPILED_FROM):
        return numba_loops.greedy_order(np.asarray(weights, np.float64), samples)
    return greedy_order(weights, samples)


def greedy_order(weights: Sequence[float], samples: int) -> tuple[np.ndarray, np.ndarray]:
    """What blend_order returns, a sample at a time."""
    if len(weights) > MANY_SETS:
        return _among_many(np.asarray(weights, np.float64), samples)
    sets = np.empty(samples, numba_loops.set_dtype(len(weights)))
    numbers = np.empty(samples, np.int64)
    counts = [0] * len(weights)
    for sample in range(samples):
        seen = max(float(sample), 1.0)
        chosen, largest = 0, weights[0] * seen - counts[0]
        for candidate in range(1, len(weights)):
            behind = weights[candidate] * seen - counts[candidate]
            if behind > largest:
                chosen, largest = candidate, behind
        sets[sample] = chosen
        numbers[sample] = counts[chosen]
        counts[chosen] += 1
    return sets, numbers


def _among_many(weights: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The same, with all sets compared at once."""
    sets = np.empty(samples, numba_loops.set_dtype(len(weights)))
    numbers = np.empty(samples, np.int64)
    counts = np.zeros(len(weights), np.int64)
    for sample in range(samples):
        chosen = int(np.argmax(weights * max(float(sample), 1.0) - counts))
        sets[sample] = chosen
        numbers[sample] = counts[chosen]
        counts[chosen] += 1
    return sets, numbers


def document_weights(documents: Sequence[int], alpha: float) -> list[float]:
    """The share of each set [fraction]: its share of all documents to the power alpha, normalised.

    alpha 1 draws every document equally often, 0 every set; between them small sets are drawn more than their size
    asks for (arXiv:1901.07291, section 3.1).
    """
    powers = [float(count) ** alpha if count else 0.0 for count in documents]
    total = sum(powers)
    return [power / total for power in powers] if total else powers


def full_passes(lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The order (blend_order) in which sets of so many samples are used up together, each in proportion.

    Rounding may let one set run ahead of its last sample; the order ends before that.
    """
    total = sum(lengths)
    sets, numbers = blend_order([length / total for length in lengths], total)
    beyond = np.flatnonzero(numbers >= np.asarray(lengths)[sets])
    end = int(beyond[0]) if len(beyond) else total
    return sets[:end], numbers[:end]


def samples_asked(weight: float, samples: int, drawn: int) -> int:
    """How many samples a set is built for: its share and a margin, or what the order draws from it if that is more."""
    return max(math.ceil(samples * weight * MARGIN), drawn)


class BlendedDataset:
    """Samples of several sets, in a blend's order."""

    def __init__(self, datasets: Sequence[Samples], sets: np.ndarray, numbers: np.ndarray) -> None:
        self._datasets = datasets
        self._sets = sets
        self._numbers = numbers
        self.sample_length = datasets[0].sample_length

    def __len__(self) -> int:
        return len(self._sets)

    def read(self, number: int, tokens: np.ndarray, extras: SampleExtras | None = None) -> None:
        """Writes the sample's tokens into tokens [sample_length], and what else is asked for."""
        if not 0 <= number < len(self._sets):
            raise IndexError(f"sample {number} of a blend that has {len(self)}")
        self._datasets[self._sets.item(number)].read(self._numbers.item(number), tokens, extras)

    def origin(self, number: int, position: int) -> Origin:
        """Where the token at a place of sample `number` comes from."""
        return self._datasets[self._sets.item(number)].origin(self._numbers.item(number), position)

    def documents(self, number: int) -> set[Origin]:
        """The documents that sample `number`, of joined documents, has tokens of."""
        of_set: Any = self._datasets[self._sets.item(number)]
        found: set[Origin] = of_set.documents(self._numbers.item(number))
        return found
