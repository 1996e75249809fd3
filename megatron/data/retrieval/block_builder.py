"""What samples of sentences and blocks need in place of those of language models: index maps, data sets, loaders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.dataset.batch import MicroBatch
from megatron.data.dataset.block_map import build_block_map, usable_documents
from megatron.data.dataset.data_order import token_digest
from megatron.data.dataset.gpt_dataset import SampleExtras, Samples
from megatron.data.dataset.index_cache import DIGEST_BYTES, MapRequest
from megatron.data.dataset.loader import BatchLoader
from megatron.data.dataset.sampler import BatchSampler
from megatron.data.dataset.sentence_map import SentenceMap
from megatron.data.dataset.sources import DataSource, Split
from megatron.data.indexed.sentences import SentenceDataset
from megatron.data.retrieval.blocks import FRAME, BlockSettings, SentencesAndBlocks, title_length
from megatron.data.retrieval.rows import retrieval_batch
from megatron.errors import ConfigError
from megatron.tokenizer_info import ClassTokens

CHECKED = 1 << 20
"""About as many rows of a stored map are looked at."""


@dataclass(frozen=True)
class BlockData:
    """How the samples of sentences and blocks are made."""

    tokens: ClassTokens
    """Ids of separators and padding."""
    vocab_size: int
    """Number of ids [tokens]."""
    types: bool
    """Give token types."""
    query_in_block_prob: float = 0.1
    """Share of blocks that keep the sentence of the query [fraction]."""
    one_sentence: bool = False
    """Blocks of one sentence are samples too."""
    titles_path: str | None = None
    """Token files of titles; None for none."""

    @property
    def least(self) -> int:
        """Sentences that a block needs."""
        return 1 if self.one_sentence else 2

    @cached_property
    def titles(self) -> SentenceDataset | None:
        """The titles of all documents."""
        return None if self.titles_path is None else SentenceDataset(self.titles_path, key="titles_data_path")

    def requests(self, split: Split, seq_length: int, seed: int) -> list[MapRequest]:
        """Returns the index map that each source of a split needs. Raises ConfigError for other titles' documents.

        Args:
            split: Split with its sources.
            seq_length: Length of a sample [tokens].
            seed: Seed of the order.
        """
        found: list[MapRequest] = []
        for source in split.sources:
            assert isinstance(source.dataset, SentenceDataset)
            if self.titles is not None and len(self.titles) != len(source.dataset):
                what = f"it has {len(self.titles)} titles, and {source.dataset.prefix} {len(source.dataset)} documents"
                hint = "make both with one call of tools/preprocess_data.py --json-keys text title --split-sentences"
                raise ConfigError.of(what, key="titles_data_path", value=self.titles_path, hint=hint)
            request = BlockRequest(
                dataset=source.dataset,
                titles=self.titles,
                name=source.name,
                documents=source.documents,
                seq_length=seq_length,
                least=self.least,
                samples=source.asked,
                epochs=split.epochs,
                seed=seed,
            )
            found.append(request)
        return found

    def samples(self, source: DataSource, index: Any, seq_length: int, seed: int) -> Samples:
        """Returns the samples of a source.

        Args:
            source: The data set.
            index: Its index map.
            seq_length: Length of a sample [tokens].
            seed: Seed of the run.
        """
        settings = BlockSettings(self.tokens, self.vocab_size, seed, seq_length, self.query_in_block_prob)
        return SentencesAndBlocks(source.data, self.titles, index, settings)

    def loader(self, samples: Samples, sampler: BatchSampler, **settings: Any) -> BatchLoader:
        """Returns the loader of a rank; the arguments are those of a BlockLoader."""
        return BlockLoader(samples, sampler, types=self.types, **settings)

    def order_facts(self) -> dict[str, Any]:
        """Returns the settings that decide which sample is number k, by their keys."""
        titles = None if self.titles is None else [len(self.titles), token_digest(self.titles)]
        return {
            "query_in_block_prob": self.query_in_block_prob,
            "use_one_sent_docs": self.one_sentence,
            "titles_data_path": titles,
        }


@dataclass(frozen=True)
class BlockRequest:
    """Everything that determines a map of blocks; see `IndexRequest`."""

    dataset: SentenceDataset
    """The token files."""
    titles: SentenceDataset | None
    """The titles of all documents, or None."""
    name: str
    """Of the split, such as train or valid_2."""
    documents: range
    """Range of the documents to use."""
    seq_length: int
    """Length of a sample [tokens]."""
    least: int
    """Sentences that a block needs."""
    samples: int | None
    """How many are asked for, or None where passes are."""
    epochs: int
    """Passes over the documents; 0 where the samples decide."""
    seed: int
    """Seed of the order."""

    @cached_property
    def stem(self) -> str:
        """The file's path up to its ending."""
        public = f"{self.samples}mns_{self.seq_length}msl_{self.seed}s"
        return f"{self.dataset.prefix}_{self.name}_indexmap_{public}_{self._digest()}"

    def paths(self) -> dict[str, Path]:
        """The file of each array."""
        return {"rows": Path(f"{self.stem}_block_idx.npy"), "passes": Path(f"{self.stem}_passes_idx.npy")}

    def build(self) -> SentenceMap:
        """Computes the map. ConfigError where no document can be used."""
        if not usable_documents(self._bounds, self.dataset.sentence_sizes, self.least).any():
            raise ConfigError.of(
                f"no document of {self.dataset.prefix} gives a block of {self.name}: each has fewer than {self.least} "
                "sentences, or one of more than 512 tokens",
                key="data_path",
                value=self.dataset.prefix,
                hint="make the data with tools/preprocess_data.py --split-sentences, or set use_one_sent_docs: true",
            )
        return build_block_map(
            self._bounds,
            self.dataset.sentence_sizes,
            self._targets,
            least=self.least,
            seed=self.seed,
            samples=self.samples,
            epochs=self.epochs,
        )

    def checked(self, arrays: Mapping[str, np.ndarray]) -> SentenceMap | None:
        """Returns the map of stored arrays, or None where they cannot be it."""
        rows, passes = arrays["rows"], arrays["passes"]
        if rows.ndim != 2 or rows.shape[1] != 4 or len(rows) < (self.samples or 1) or passes.shape != (1,):
            return None
        part = rows if len(rows) <= CHECKED else rows[:: len(rows) // CHECKED]
        first, last = self._bounds[0], self._bounds[-1]
        sound = (part[:, 0] >= first) & (part[:, 0] < part[:, 1]) & (part[:, 1] <= last)
        sound &= (part[:, 2] >= self.documents.start) & (part[:, 2] < self.documents.stop)
        return SentenceMap(rows, passes) if sound.all() else None

    @cached_property
    def _bounds(self) -> np.ndarray:
        return self.dataset.bounds[self.documents.start : self.documents.stop + 1]

    @cached_property
    def _targets(self) -> np.ndarray:
        """Length of a block of each document [tokens]."""
        longest = self.seq_length - FRAME
        if self.titles is None:
            return np.full(len(self.documents), longest)
        sizes = self.titles.sizes[self.documents.start : self.documents.stop]
        return longest - np.minimum(sizes, title_length(1 << 30, self.seq_length))

    def _digest(self) -> str:
        found = hashlib.blake2b(np.ascontiguousarray(self.dataset.sentence_sizes).data, digest_size=DIGEST_BYTES)
        found.update(np.ascontiguousarray(self._bounds).data)
        found.update(np.ascontiguousarray(self._targets, np.int64).data)
        found.update(f"{self.documents} epochs {self.epochs} least {self.least}".encode())
        return found.hexdigest()


class BlockLoader(BatchLoader):
    """The micro-batches of one rank: sentences, then their blocks."""

    def __init__(self, samples: Samples, sampler: BatchSampler, *, types: bool, **settings: Any) -> None:
        """Takes the samples of a rank.

        Args:
            samples: The data set.
            sampler: The rank's share of it.
            types: Give token types.
            settings: Further settings of a `BatchLoader`.
        """
        super().__init__(samples, sampler, eod=0, **settings)
        self._types = types

    def _read(self, numbers: range) -> MicroBatch:
        shape = (len(numbers), self.samples.sample_length)
        tokens, borders = np.empty(shape, np.int64), np.empty(shape, bool)
        for row, number in enumerate(numbers):
            self.samples.read(number, tokens[row], SampleExtras(borders=borders[row]))
        own = np.arange(len(numbers))
        batch = retrieval_batch(_in_rows(tokens), _in_rows(borders), own, own >= 0, types=self._types)
        return batch.pin_memory() if self._pin_memory else batch


def _in_rows(both: np.ndarray) -> np.ndarray:
    """[b, 2 s] -> [2 b, s], queries first."""
    return np.concatenate(np.split(both, 2, axis=1))
