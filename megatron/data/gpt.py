"""The packed data set: documents joined end to end and cut into samples of seq_length + 1 tokens."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from megatron.data.index_map import IndexMap
from megatron.data.indexed import IndexedDataset


class Samples(Protocol):
    """Numbered samples of equal length. sample_length: [tokens], one more than the sequence length."""

    @property
    def sample_length(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, number: int, out: np.ndarray) -> None:
        """Writes sample `number` into out, an integer array of sample_length tokens."""
        ...


class PackedDataset:
    """Samples of an indexed data set in the order of an index map (index_map.py says which tokens they hold)."""

    def __init__(self, dataset: IndexedDataset, index: IndexMap, seq_length: int) -> None:
        self._dataset = dataset
        self._index = index
        self.sample_length = seq_length + 1

    def __len__(self) -> int:
        return len(self._index)

    def read(self, number: int, out: np.ndarray) -> None:
        """Writes the sample's tokens into out [seq_length + 1]."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of a data set that has {len(self)}")
        index, dataset = self._index, self._dataset
        row = int(index.shuffle[number])
        position, offset = index.samples[row].tolist()
        filled, wanted = 0, self.sample_length
        while filled < wanted:
            document = int(index.documents[position])
            piece = dataset.get(document, offset, min(wanted - filled, int(dataset.sizes[document]) - offset))
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            position, offset = position + 1, 0

    def __getitem__(self, number: int) -> np.ndarray:
        """The sample's tokens, int64 [seq_length + 1]."""
        out = np.empty(self.sample_length, np.int64)
        self.read(number, out)
        return out
