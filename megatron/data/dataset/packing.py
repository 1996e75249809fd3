"""Samples of whole documents: one a sample (`unpacked`), or as many as fit (`pack_until_overflow`).

In each pass the documents are shuffled. Packing takes them in that order and opens a new sample when the next one does
not fit; the samples of the pass are then shuffled. A pass is served to its end before the next one starts, so after
whole passes every document was seen equally often. A document longer than a sample is cut to it, or left out.

The arrays are those of index_map.py: sample i holds the documents from position samples[i, 0] up to samples[i + 1, 0].
"""

from __future__ import annotations

import numpy as np

from megatron.data.dataset.index_map import IndexMap
from megatron.data.indexed.reader import IGNORE_INDEX, IndexedDataset

BLOCK = 1 << 24  # labels looked at together


def usable_documents(
    sizes: np.ndarray,
    documents: range,
    *,
    seq_length: int,
    chopped: bool,
    labels: IndexedDataset | None = None,
) -> np.ndarray:
    """The documents that can be in a sample, int64, ascending.

    Left out are empty documents, those longer than seq_length + 1 tokens unless chopped, and those without any label to
    learn in the part that is used.

    Args:
        sizes: Length of each document [tokens].
        documents: Range of documents to choose from.
        seq_length: Length of a sample [tokens].
        chopped: True if long documents are cut instead of left out.
        labels: Labels of the same documents, if they have any.
    """
    own = np.asarray(sizes[documents.start : documents.stop])
    usable = own > 0
    if not chopped:
        usable &= own <= seq_length + 1
    if labels is not None:
        usable &= has_labels(labels, documents, seq_length)
    return np.flatnonzero(usable) + documents.start


def has_labels(labels: IndexedDataset, documents: range, seq_length: int) -> np.ndarray:
    """Whether the first seq_length + 1 tokens of each document hold a label to learn, bool [documents]."""
    starts = np.asarray(labels.starts, np.int64) // labels.dtype.itemsize
    found = np.zeros(len(labels), bool)
    for first in range(0, len(labels.tokens), BLOCK):
        labelled = np.flatnonzero(labels.tokens[first : first + BLOCK] != IGNORE_INDEX) + first
        owners = np.searchsorted(starts, labelled, side="right") - 1
        offsets = labelled - starts[owners]
        # The first token of a document is never a label within it.
        found[owners[(offsets >= 1) & (offsets <= seq_length)]] = True
    return found[documents.start : documents.stop]


def build_unpacked_map(
    sizes: np.ndarray, usable: np.ndarray, *, seq_length: int, packed: bool, seed: int, samples: int, epochs: int = 0
) -> IndexMap:
    """The map of whole documents: `epochs` passes, or as many as give so many samples when epochs is 0.

    Args:
        sizes: Lengths of all documents [tokens].
        usable: The documents to use, at least one.
        seq_length: Length of a sample [tokens].
        packed: As many documents in a sample as fit.
        seed: Seed of the order.
        samples: Samples that are needed.
        epochs: Passes over the documents; 0 for as many as the samples need.
    """
    generator = np.random.RandomState(seed)
    orders, firsts, shuffles = [], [], []
    documents, made, passes = 0, 0, 0
    while passes < epochs or (epochs == 0 and (made < samples or passes == 0)):
        order = usable.astype(np.int32)
        generator.shuffle(order)
        lengths = np.minimum(np.asarray(sizes)[order], seq_length + 1)
        first = _fitted(lengths, seq_length + 1) if packed else np.arange(len(order))
        shuffle = np.arange(made, made + len(first), dtype=np.uint32)
        generator.shuffle(shuffle)
        orders.append(order)
        firsts.append(first + documents)
        shuffles.append(shuffle)
        documents, made, passes = documents + len(order), made + len(first), passes + 1
    starts = np.zeros((made + 1, 2), np.int64 if 2 * (made + 1) >= 2**31 else np.int32)
    starts[:, 0] = np.concatenate([*firsts, [documents]])
    return IndexMap(np.concatenate(orders), starts, np.concatenate(shuffles), passes)


def _fitted(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The first document of each sample, when each takes documents until the next one does not fit."""
    ends = np.cumsum(lengths, dtype=np.int64)
    # Where the sample after the one that starts at each document would start.
    following = np.searchsorted(ends, ends - lengths + capacity, side="right").tolist()
    firsts, at = [], 0
    while at < len(following):
        firsts.append(at)
        at = following[at]
    return np.array(firsts, np.int64)
