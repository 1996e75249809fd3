"""The chunks that neighbours are found among: documents of token files, cut every m tokens.

`chunks.npy` has a row for each: number of its data set, document, first token in the document, tokens (the last chunk
of a document may be shorter). A neighbour is a chunk and what follows it in its document, filled up with end tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.dataset.data_order import token_digest
from megatron.data.indexed.reader import IndexedDataset
from megatron.errors import ConfigError, RunError

CHUNKS = "chunks.npy"
KEY = "retro_project_dir"


def cut(datasets: Sequence[tuple[IndexedDataset, range]], chunk: int) -> np.ndarray:
    """Returns the chunks of documents, int64 [n, 4].

    Args:
        datasets: token files, each with the documents of it that are used.
        chunk: m [tokens].
    """
    parts = []
    for number, (dataset, documents) in enumerate(datasets):
        sizes = dataset.sizes[documents.start : documents.stop].astype(np.int64)
        counts = -(-sizes // chunk)
        owner = np.repeat(np.arange(len(sizes)), counts)
        turn = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = turn * chunk
        length = np.minimum(chunk, sizes[owner] - first)
        parts.append(np.stack([np.full_like(owner, number), owner + documents.start, first, length], axis=1))
    return np.concatenate(parts)


def open_files(folder: Path, facts: Mapping[str, Any]) -> list[IndexedDataset]:
    """Returns the token files of a database. Raises ConfigError where they are no longer those that it was made of.

    folder: of the database. facts: of its `retro.json`.
    """
    found = [IndexedDataset(path) for path in facts["data_paths"]]
    for dataset, digest in zip(found, facts["digests"], strict=True):
        if token_digest(dataset) != digest:
            what = f"{dataset.prefix} has other tokens than when its chunks were cut"
            raise ConfigError.of(what, key=KEY, value=str(folder), hint="build another database")
    return found


class ChunkDatabase:
    """The chunks of a folder and the token files that they are in."""

    def __init__(self, folder: Path, datasets: Sequence[IndexedDataset], eod: int) -> None:
        """Opens the chunks. Raises RunError where they cannot be read.

        Args:
            folder: with the chunks.
            datasets: token files by their number.
            eod: the id that fills a neighbour up.
        """
        try:
            self.rows = np.load(folder / CHUNKS, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise RunError.of(f"its chunks cannot be read: {error}", key=KEY, location=str(folder)) from None
        self._datasets, self._eod = datasets, eod

    def __len__(self) -> int:
        return len(self.rows)

    def chunk(self, number: int) -> np.ndarray:
        """Returns the tokens of a chunk."""
        source, document, first, length = map(int, self.rows[number])
        return self._datasets[source].get(document, first, length)

    def read(self, number: int, tokens: np.ndarray) -> None:
        """Writes a neighbour: the chunk and what follows it. number: of the chunk; -1 for end tokens alone."""
        tokens[:] = self._eod
        if number < 0:
            return
        source, document, first, _ = map(int, self.rows[number])
        dataset = self._datasets[source]
        found = min(len(tokens), int(dataset.sizes[document]) - first)
        tokens[:found] = dataset.get(document, first, found)

    def owners(self) -> np.ndarray:
        """Returns a number for the document of each chunk, int64 [n]."""
        return owner_of(np.asarray(self.rows[:, 0]), np.asarray(self.rows[:, 1]))


def owner_of(source: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Returns a number for each pair of a data set and a document."""
    owner: np.ndarray = (source.astype(np.int64) << 40) + document
    return owner
