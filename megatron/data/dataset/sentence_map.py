"""Which sentences make which masked sample: the rows of the public build_mapping, in the public order.

In each pass the documents come in file order. A document gives samples one after another: sentences are taken until
their tokens reach the target length and more than one sentence is left, and the last sample takes the rest. The target
is the longest length, or for one sample in round(1 / short_seq_prob) a random shorter one. Documents with fewer
sentences than a sample needs, and those of several sentences with one of more than 512 tokens, are left out. Passes are
added until there are enough samples; then all rows are shuffled.

rows: [n, 3], the first sentence of a sample, the sentence after its last one, and its target length [tokens].

Source: Megatron-LM and Megatron-Core compute the same values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.data.dataset import numba_loops
from megatron.data.dataset.mersenne_twister import Draws32, draws_64

LONG_SENTENCE = 512  # [tokens]
COMPILED_FROM = 2_000_000  # sentences, over all passes


@dataclass(frozen=True)
class SentenceMap:
    """The rows of samples or blocks, as the module that builds them says, and the passes over the documents."""

    rows: np.ndarray
    """First sentence and end of each row, and further columns."""
    passes: np.ndarray
    """Passes over the documents, int64 [1]."""

    @property
    def epochs(self) -> int:
        """Passes over the documents."""
        return int(self.passes[0])

    def __len__(self) -> int:
        return len(self.rows)


def usable_documents(bounds: np.ndarray, sizes: np.ndarray, least: int) -> np.ndarray:
    """Returns whether each document gives samples, bool [documents].

    Args:
        bounds: The first sentence of each document, and the end of the last one [documents + 1].
        sizes: Length of each sentence of the data set [tokens].
        least: Sentences that a sample needs.
    """
    counts = np.diff(bounds)
    return (counts >= max(least, 1)) & ~(with_long_sentences(bounds, sizes) & (counts > 1))


def with_long_sentences(bounds: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns whether each document has a sentence of more than 512 tokens, bool [documents].

    bounds and sizes: as for `usable_documents`.
    """
    ends = np.concatenate([[0], np.cumsum(sizes[bounds[0] : bounds[-1]] > LONG_SENTENCE)])
    return np.diff(ends[bounds - bounds[0]]) > 0


def build_sentence_map(
    bounds: np.ndarray,
    sizes: np.ndarray,
    *,
    max_length: int,
    short_seq_prob: float,
    least: int,
    seed: int,
    samples: int | None,
    epochs: int = 1,
) -> SentenceMap:
    """Returns the map of some of a data set's documents, of which at least one must be usable.

    Args:
        bounds: The first sentence of each document, and the end of the last one [documents + 1].
        sizes: Length of each sentence of the data set [tokens].
        max_length: Most tokens of sentences in a sample, at least 2.
        short_seq_prob: Share of samples with a random shorter target [fraction].
        least: Sentences that a sample needs.
        seed: Of the target lengths and, plus one, of the order.
        samples: Samples that are needed; None for `epochs` passes.
        epochs: Passes where samples are not counted.
    """
    usable = usable_documents(bounds, sizes, least)
    firsts, ends = bounds[:-1][usable], bounds[1:][usable]
    ratio = int(1.0 / short_seq_prob + 0.5) if short_seq_prob > 0 else 0
    draws = Draws32(seed)
    sentences = int((ends - firsts).sum())
    passes: list[np.ndarray] = []
    made = 0
    while made < samples if samples is not None else len(passes) < epochs:
        numbers = draws.peek(sentences + len(firsts)) if ratio else np.empty(0, np.int64)
        rows = np.empty((sentences, 3), np.uint32 if len(sizes) < 1 << 32 else np.int64)
        if numba_loops.worth_compiling(sentences, COMPILED_FROM):
            count, used = numba_loops.sentence_rows(firsts, ends, sizes, numbers, ratio, max_length, least, rows)
        else:
            lists = firsts.tolist(), ends.tolist(), sizes.tolist(), numbers.tolist()
            count, used = numba_loops.fill_rows(*lists, ratio, max_length, least, rows)
        draws.take(used)
        passes.append(rows[:count].copy())
        made += count
    joined = np.concatenate(passes) if passes else np.empty((0, 3), np.uint32)
    return SentenceMap(joined[shuffled(len(joined), seed + 1)], np.array([len(passes)]))


def shuffled(count: int, seed: int) -> np.ndarray:
    """Returns the public order of so many rows: each row from the last one on is swapped with one before it or itself.

    count: rows. seed: of std::mt19937_64.
    """
    order = np.arange(count)
    if count < 2:
        return order
    partners = (draws_64(seed, count - 1) % np.arange(count, 1, -1, dtype=np.uint64)).astype(np.int64)
    if numba_loops.worth_compiling(count, COMPILED_FROM):
        numba_loops.swap_rows(order, partners)
        return order
    numbers = order.tolist()
    numba_loops.swap(numbers, partners.tolist())
    return np.array(numbers)
