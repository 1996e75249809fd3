"""Chunks, their embeddings, and the neighbours of a run's samples: the work of ranks that share a folder.

Ranks take blocks of chunks, then blocks of samples; what a folder already has is not computed again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.atomic import atomic_path
from megatron.config.derived.retrieval import EXACT, IVF
from megatron.data.dataset.data_order import token_digest
from megatron.data.indexed.reader import IndexedDataset, bin_path
from megatron.data.retro import neighbors
from megatron.data.retro.chunks import CHUNKS, KEY, ChunkDatabase, cut, owner_of
from megatron.data.retro.neighbors import INDEX, PROBE, NeighborFile, fingerprint
from megatron.distributed.process_group import device
from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.param_table import RetroDims
from megatron.ranks import Ranks
from megatron.retrieval import embedding_file
from megatron.retrieval.embedding_file import EmbeddingFile
from megatron.retrieval.faiss_index import FaissIndex, open_index
from megatron.retrieval.neighbors import nearest_by_index, nearest_elsewhere
from megatron.retrieval.text_embedder import KEY as EMBEDDER_KEY
from megatron.retrieval.text_embedder import TextEmbedder

EMBEDDINGS = "embeddings"
"""Folder of the embeddings of chunks."""


@dataclass(frozen=True)
class RetroBuilder:
    """What the database of a run is made of."""

    folder: Path
    """Of the database."""
    sources: Sequence[tuple[IndexedDataset, range]]
    """Token files, each with the documents that are cut into chunks."""
    splits: Mapping[str, tuple[Any, int]]
    """Samples of each split (data sets of joined documents), and how many of them the run reads."""
    sizes: RetroDims
    """Of chunks."""
    saved: int
    """Neighbours of a chunk that are stored."""
    tokenizer: tuple[Callable[[Sequence[int]], str], int, str]
    """Tokens to text, the id that ends a document, and the tokenizer's fingerprint."""
    embedder: TextEmbedder
    """Embeds texts."""
    batch: int
    """Texts of one pass."""
    index: tuple[str, int]
    """How neighbours are found: `retrieval_index`, and the cells that `ivf` compares with."""

    def facts(self) -> dict[str, Any]:
        """Returns what decides the database."""
        kind, probes = self.index
        return {
            "chunk_length": self.sizes.chunk,
            "saved": self.saved,
            INDEX: None if kind == EXACT else f"{kind} {probes}" if kind == IVF else kind,
            "tokenizer": self.tokenizer[2],
            "data_paths": [os.path.abspath(dataset.prefix) for dataset, _ in self.sources],
            "digests": [token_digest(dataset) for dataset, _ in self.sources],
            "documents": [[own.start, own.stop] for _, own in self.sources],
            **{
                split: {"samples": count, "fingerprint": fingerprint(samples, count)}
                for split, (samples, count) in self.splits.items()
            },
        }

    def create(self) -> None:
        """Makes the files that a folder lacks. Raises ConfigError where it is the database of another run."""
        facts = self.facts()
        if (self.folder / neighbors.HEADER).exists():
            found = neighbors.read_header(self.folder)
            neighbors.require_same(self.folder, found, facts)
            require_embedder(self.folder, found, self.embedder)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        chunks = cut(self.sources, self.sizes.chunk)
        with atomic_path(self.folder / CHUNKS) as temporary, temporary.open("wb") as file:
            np.save(file, chunks)
        shutil.rmtree(self.folder / EMBEDDINGS, ignore_errors=True)  # of a database without its facts
        of_chunks = {"passages": len(chunks), "width": self.embedder.width, "dtype": "float32"}
        embedding_file.create(self.folder / EMBEDDINGS, of_chunks)
        for split, (samples, count) in self.splits.items():
            of_sample = (samples.sample_length - 1) // self.sizes.chunk
            neighbors.create(self.folder, split, (count, of_sample, self.saved))
        neighbors.write_header(self.folder, {**facts, PROBE: _probe(self.embedder)})

    def embed(self) -> None:
        """Embeds this rank's share of the chunks."""
        database, stored = self._database(), EmbeddingFile(self.folder / EMBEDDINGS, writes=True)
        for block in self._share(stored.missing, "chunks"):
            stored.write(block, self._vectors([database.chunk(number) for number in stored.numbers(block)]))

    def build_index(self) -> None:
        """Writes the index that neighbours are found by, where it has a file and the folder lacks it."""
        if self.index[0] == IVF:
            self._open_index(self._embedded())

    def search(self) -> None:
        """Finds the neighbours of this rank's share of the samples, in documents that a sample has no tokens of.

        Raises ConfigError where chunks have no embeddings yet.
        """
        database, vectors = self._database(), self._embedded()
        owners, index = database.owners(), self._open_index(vectors)
        files = {file_of(dataset): number for number, (dataset, _) in enumerate(self.sources)}
        numbers: dict[str, int | None] = {}  # of data sets by their prefix; None for one that is not in the database
        for split, (samples, _) in self.splits.items():
            stored = NeighborFile(self.folder, split, writes=True)
            for block in self._share(stored.missing, f"samples of {split}"):
                own = stored.numbers(block)
                tokens = np.empty((len(own), samples.sample_length), np.int64)
                for row, number in zip(tokens, own, strict=True):
                    samples.read(number, row)
                chunks = tokens[:, :-1].reshape(-1, self.sizes.chunk)
                documents = [samples.documents(number) for number in own]
                for dataset in {origin.source.tokens for each in documents for origin in each}:
                    numbers.setdefault(dataset.prefix, files.get(file_of(dataset)))
                left_out = [_owners_of(each, numbers) for each in documents]
                questions = torch.from_numpy(self._vectors(list(chunks))).to(device())
                if index is None:
                    found = nearest_elsewhere(questions, vectors, owners, left_out, self.saved)
                else:
                    found = nearest_by_index(index, questions, owners, left_out, self.saved)
                stored.write(block, found.reshape(len(own), -1, self.saved))

    def _database(self) -> ChunkDatabase:
        return ChunkDatabase(self.folder, [dataset for dataset, _ in self.sources], self.tokenizer[1])

    def _embedded(self) -> np.ndarray:
        """The embeddings of all chunks. Raises ConfigError where some are missing."""
        embedded = EmbeddingFile(self.folder / EMBEDDINGS, writes=False)
        embedded.require_complete(self.folder, key=KEY, hint=neighbors.HINT)
        return embedded.rows

    def _open_index(self, vectors: np.ndarray) -> FaissIndex | None:
        kind, probes = self.index
        return open_index(kind, self.folder / EMBEDDINGS, vectors, probes, distances=True)

    def _vectors(self, chunks: Sequence[np.ndarray]) -> np.ndarray:
        text, eod, _ = self.tokenizer
        return self.embedder.embed([text(chunk[chunk != eod].tolist()) for chunk in chunks], self.batch)

    def _share(self, missing: Sequence[int], what: str) -> list[int]:
        ranks = Ranks.from_environment()
        own = [block for block in missing if block % ranks.world_size == ranks.rank]  # others write while this reads
        get_logger(__name__).info("%d blocks of %s are left for this rank", len(own), what)
        return own


def _probe(embedder: TextEmbedder) -> list[float]:
    """The embedding of a text, which says whether an encoder is the same."""
    return [float(value) for value in embedder.embed(["a b c"], 1)[0]]


def require_embedder(folder: Path, facts: Mapping[str, Any], embedder: TextEmbedder) -> None:
    """Raises ConfigError where a database was made with another encoder.

    Args:
        folder: of the database.
        facts: of its `retro.json`.
        embedder: of this run.
    """
    if not embedding_file.is_same(facts[PROBE], _probe(embedder)):
        what = f"the database in {folder} was made with another encoder"
        raise ConfigError.of(what, key=EMBEDDER_KEY, value=None, hint="name the encoder that it was made with")


def file_of(dataset: IndexedDataset) -> str:
    """Returns the path of a token file behind links, which is one for all names that it has."""
    return os.path.realpath(bin_path(dataset.prefix))


def _owners_of(documents: set[Any], numbers: Mapping[str, int | None]) -> np.ndarray:
    """Returns the numbers of documents in the database; those of other data sets are not in it."""
    named = [(numbers[origin.source.tokens.prefix], origin.document) for origin in documents]
    pairs = [(number, document) for number, document in named if number is not None]
    sources, own = (np.array(values, np.int64) for values in zip(*pairs, strict=True)) if pairs else (np.empty(0),) * 2
    return owner_of(sources, own)
