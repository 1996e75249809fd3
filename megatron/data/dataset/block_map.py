"""Which sentences make which block of the inverse cloze task: the rows of the public build_blocks_mapping.

In each pass the documents come in file order. Sentences are taken until they reach the target length, and enough of
them are in the block and left behind it; the last block of a document takes the rest. The target leaves room for the
title. Documents with fewer sentences than a block needs, and those with a sentence of more than 512 tokens, are left
out. Passes are added until there are enough blocks; then all rows are shuffled.

rows: [n, 4], the first sentence of a block, the sentence after its last one, its document and its number in the pass.

Source: Megatron-LM and Megatron-Core compute the same values.
"""

from __future__ import annotations

import numpy as np

from megatron.data.dataset import numba_loops
from megatron.data.dataset.sentence_map import COMPILED_FROM, SentenceMap, shuffled, with_long_sentences


def usable_documents(bounds: np.ndarray, sizes: np.ndarray, least: int) -> np.ndarray:
    """Returns whether each document gives blocks, bool [documents].

    Args:
        bounds: The first sentence of each document, and the end of the last one [documents + 1].
        sizes: Length of each sentence of the data set [tokens].
        least: Sentences that a block needs.
    """
    return (np.diff(bounds) >= max(least, 1)) & ~with_long_sentences(bounds, sizes)


def one_pass(bounds: np.ndarray, sizes: np.ndarray, targets: np.ndarray, least: int) -> np.ndarray:
    """Returns the blocks of some documents in their order [n, 4], with documents numbered from 0.

    Args:
        bounds: The first sentence of each document, and the end of the last one [documents + 1].
        sizes: Length of each sentence of the data set [tokens].
        targets: Length of a block of each document [tokens].
        least: Sentences that a block needs.
    """
    numbers = np.flatnonzero(usable_documents(bounds, sizes, least))
    firsts, ends = bounds[:-1][numbers], bounds[1:][numbers]
    sentences = int((ends - firsts).sum())
    rows = np.empty((sentences, 4), np.uint32 if len(sizes) < 1 << 32 else np.int64)
    if numba_loops.worth_compiling(sentences, COMPILED_FROM):
        count = numba_loops.block_rows(firsts, ends, sizes, targets[numbers], least, rows)
    else:
        lists = firsts.tolist(), ends.tolist(), sizes.tolist(), targets[numbers].tolist()
        count = numba_loops.fill_blocks(*lists, least, rows)
    rows = rows[:count]
    rows[:, 2] = numbers[rows[:, 2].astype(np.int64)]
    return rows


def build_block_map(
    bounds: np.ndarray,
    sizes: np.ndarray,
    targets: np.ndarray,
    *,
    least: int,
    seed: int,
    samples: int | None,
    epochs: int = 1,
) -> SentenceMap:
    """Returns the map of some of a data set's documents, of which at least one must be usable.

    Args:
        bounds: The first sentence of each document, and the end of the last one [documents + 1].
        sizes: Length of each sentence of the data set [tokens].
        targets: Length of a block of each document [tokens].
        least: Sentences that a block needs.
        seed: Of the order, plus one.
        samples: Blocks that are needed; None for `epochs` passes.
        epochs: Passes where blocks are not counted.
    """
    rows = one_pass(bounds, sizes, targets, least)
    passes = epochs if samples is None else -(-samples // len(rows))
    joined = np.tile(rows, (passes, 1))
    return SentenceMap(joined[shuffled(len(joined), seed + 1)], np.array([passes]))
