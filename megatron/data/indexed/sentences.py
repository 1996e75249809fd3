"""A data set whose items are sentences, by documents: `tools/preprocess_data.py --split-sentences` writes such."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron.data.indexed.reader import IndexedDataset
from megatron.errors import RunError


class SentenceDataset(IndexedDataset):
    """The same files with documents as items: `len`, `sizes`, `starts` and `get` are those of documents.

    sentence_sizes: int32 [sentences], length of each sentence [tokens]. sentence_starts: int64 [sentences], where it
    starts [bytes]. bounds: int64 [documents + 1], the first sentence of each document, and the end of the last one.
    """

    def __init__(self, prefix: str | Path, *, key: str | None = None) -> None:
        super().__init__(prefix, key=key)
        self.sentence_sizes, self.sentence_starts = self.sizes, self.starts
        self.bounds = np.asarray(self.document_index)
        sentences = len(self.sentence_sizes)
        if not len(self.bounds) or self.bounds[0] or self.bounds[-1] != sentences or np.diff(self.bounds).min() < 0:
            raise RunError.of(
                f"its documents do not have the {sentences} sentences of the index",
                location=f"{self.prefix}.idx",
                hint="make the data again with tools/preprocess_data.py --split-sentences",
            )
        ends = np.concatenate([[0], np.cumsum(self.sentence_sizes, dtype=np.int64)])[self.bounds]
        self.sizes = np.diff(ends).astype(np.int32)
        self.starts = ends[:-1] * self.dtype.itemsize
