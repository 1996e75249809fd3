"""Which tokens make which sample: the packed data set's three arrays, with the public values bit for bit.

All documents, E times over, are shuffled and joined into one long row of tokens. Sample i starts at token i * seq of
the row and has seq + 1 tokens, the last of which is the first of sample i + 1: inputs and labels are each seq long.
Then the samples are shuffled. E is the least number of passes that gives the samples asked for.

- documents: int32 [E * D], the order of the documents in the row; one joint shuffle over all passes.
- samples: int32 (int64 from 2^31 entries on) [n + 1, 2], for each sample's first token the position in `documents` and
  the offset in that document; the last entry closes the last sample. n = (E * T - 1) // seq for T tokens a pass.
- shuffle: uint32 [n], the order in which samples are served.

Both shuffles draw from one numpy RandomState(seed), documents first: its stream is frozen by numpy for good.

Source: GPT-NeoX 2 and Megatron-LM compute the same values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.data.dataset import numba_loops

COMPILED_FROM = 2_000_000  # documents, over all passes


@dataclass(frozen=True)
class IndexMap:
    """The three arrays of the module's docstring, and the number of passes over the documents."""

    documents: np.ndarray
    """Order of the documents."""
    samples: np.ndarray
    """Start of each sample: document and offset."""
    shuffle: np.ndarray
    """Order in which samples are served."""
    epochs: int
    """Passes over the documents."""

    def __len__(self) -> int:
        return len(self.shuffle)


def epochs_needed(tokens_per_epoch: int, seq_length: int, samples: int) -> int:
    """The least number of passes, at least 1, that gives so many samples of seq_length + 1 overlapping tokens."""
    return max(1, -(-(samples * seq_length + 1) // tokens_per_epoch))


def samples_in(tokens_per_epoch: int, seq_length: int, epochs: int) -> int:
    """The samples that so many passes give."""
    return (epochs * tokens_per_epoch - 1) // seq_length


def sample_starts(sizes: np.ndarray, order: np.ndarray, *, seq_length: int, count: int) -> np.ndarray:
    """Where `count` samples and the end of the last one start: position in the order and offset, [count + 1, 2].

    Args:
        sizes: Length of each document [tokens].
        order: Documents in shuffled order.
        seq_length: Length of a sample [tokens].
        count: Number of samples.
    """
    starts = np.empty((count + 1, 2), np.int64 if 2 * (count + 1) >= 2**31 else np.int32)
    if numba_loops.worth_compiling(len(order), COMPILED_FROM):
        numba_loops.first_tokens(sizes, order, seq_length, starts)
    else:
        first_tokens(sizes, order, seq_length, starts)
    return starts


def first_tokens(sizes: np.ndarray, order: np.ndarray, seq_length: int, starts: np.ndarray) -> None:
    """Fills the starts by a binary search of every i * seq_length in the running sum of the lengths.

    Args:
        sizes: Length of each document [tokens].
        order: Documents in shuffled order.
        seq_length: Length of a sample [tokens].
        starts: Result, [count + 1, 2].
    """
    ends = np.cumsum(sizes[order], dtype=np.int64)
    begins = np.arange(len(starts), dtype=np.int64) * seq_length
    positions = np.searchsorted(ends, begins, side="right")
    starts[:, 0] = positions
    # Each document starts where the one before it ends; the first one starts at 0.
    starts[:, 1] = begins - np.where(positions > 0, ends[positions - 1], 0)


def build_index_map(sizes: np.ndarray, documents: range, *, seq_length: int, epochs: int, seed: int) -> IndexMap:
    """The map of some of a data set's documents.

    Args:
        sizes: Length of every document of the set [tokens].
        documents: Those to use.
        seq_length: Length of a sample [tokens].
        epochs: Passes over the documents.
        seed: Of the two shuffles. The documents must hold at least one token.
    """
    generator = np.random.RandomState(seed)
    order = np.tile(np.arange(documents.start, documents.stop, dtype=np.int32), epochs)
    generator.shuffle(order)
    sizes = np.require(sizes, requirements="A")
    count = samples_in(int(sizes[documents.start : documents.stop].sum(dtype=np.int64)), seq_length, epochs)
    samples = sample_starts(sizes, order, seq_length=seq_length, count=count)
    shuffle = np.arange(count, dtype=np.uint32 if count < np.iinfo(np.uint32).max - 1 else np.int64)
    generator.shuffle(shuffle)
    return IndexMap(order, samples, shuffle, epochs)
