"""What masked samples need in place of the samples of language models: index maps, data sets, loaders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megatron.data.dataset.batch import MicroBatch
from megatron.data.dataset.document_starts import document_starts
from megatron.data.dataset.gpt_dataset import SampleExtras, Samples
from megatron.data.dataset.index_cache import DIGEST_BYTES, IndexRequest, MapRequest
from megatron.data.dataset.index_map import epochs_needed
from megatron.data.dataset.loader import BatchLoader
from megatron.data.dataset.masked_dataset import FRAME, MaskedSettings, PackedDocuments, SentencePairs
from megatron.data.dataset.masking import MaskingRule
from megatron.data.dataset.sampler import BatchSampler
from megatron.data.dataset.sentence_map import SentenceMap, build_sentence_map, usable_documents
from megatron.data.dataset.sources import DataSource, Split
from megatron.data.indexed.sentences import SentenceDataset
from megatron.errors import ConfigError
from megatron.tokenizer_info import MaskingTokens


class MaskedSamples(Protocol):
    """What makes samples of a kind in place of those of language models."""

    def requests(self, split: Split, seq_length: int, seed: int) -> list[MapRequest]: ...

    def samples(self, source: DataSource, index: Any, seq_length: int, seed: int) -> Samples: ...

    def order_facts(self) -> dict[str, Any]: ...

    def loader(self, samples: Samples, sampler: BatchSampler, **settings: Any) -> BatchLoader: ...


@dataclass(frozen=True)
class MaskedData:
    """How the samples of a masked language model are made."""

    tokens: MaskingTokens
    """Ids of the vocabulary."""
    sentence_order: bool
    """Samples have two segments, whose order is learned."""
    packed: bool
    """Documents are joined without padding; otherwise a sample has sentences of one document, and padding."""
    mask_prob: float = 0.15
    """Share of tokens that are to be predicted [fraction]."""
    max_ngram: int = 3
    """Most words that are masked together."""
    short_seq_prob: float = 0.1
    """Share of padded samples with a shorter target [fraction]."""

    @property
    def least(self) -> int:
        """Sentences that a padded sample needs."""
        return 2 if self.sentence_order else 1

    def requests(self, split: Split, seq_length: int, seed: int) -> list[MapRequest]:
        """Returns the index map that each source of a split needs.

        Args:
            split: Split with its sources.
            seq_length: Length of a sample [tokens].
            seed: Seed of the order.
        """
        return [self._request(split, source, seq_length, seed) for source in split.sources]

    def samples(self, source: DataSource, index: Any, seq_length: int, seed: int) -> Samples:
        """Returns the samples of a source.

        Args:
            source: The data set.
            index: Its index map.
            seq_length: Length of a sample [tokens].
            seed: Seed of the run.
        """
        rule = MaskingRule(self.tokens, self.mask_prob, self.max_ngram)
        settings = MaskedSettings(rule, seed, seq_length, self.sentence_order)
        return (PackedDocuments if self.packed else SentencePairs)(source.data, index, settings)

    def loader(self, samples: Samples, sampler: BatchSampler, **settings: Any) -> BatchLoader:
        """Returns the loader of a rank; the arguments are those of a MaskedLoader."""
        return MaskedLoader(samples, sampler, segments=self.sentence_order, **settings)

    def order_facts(self) -> dict[str, Any]:
        """Returns the settings that decide which sample is number k, by their keys."""
        facts = {"mask_prob": self.mask_prob, "mask_max_ngram": self.max_ngram, "bert_binary_head": self.sentence_order}
        return facts if self.packed else {**facts, "short_seq_prob": self.short_seq_prob}

    def _request(self, split: Split, source: DataSource, seq_length: int, seed: int) -> MapRequest:
        dataset = source.dataset
        assert isinstance(dataset, SentenceDataset)
        if not self.packed:
            return SentenceRequest(
                dataset=dataset,
                name=source.name,
                documents=source.documents,
                max_length=seq_length - FRAME,
                short_seq_prob=self.short_seq_prob,
                least=self.least,
                samples=source.asked,
                epochs=split.epochs,
                seed=seed,
            )
        framed = PackedDocuments.FRAMED
        tokens = source.tokens + framed * len(source.documents)
        return IndexRequest(
            dataset=dataset,
            name=source.name,
            documents=source.documents,
            seq_length=seq_length,
            samples=source.asked,
            epochs=split.epochs or epochs_needed(tokens, seq_length, source.asked or 0),
            seed=seed,
            framed=framed,
        )


@dataclass(frozen=True)
class SentenceRequest:
    """Everything that determines a map of sentences; see `IndexRequest`."""

    dataset: SentenceDataset
    """The token files."""
    name: str
    """Of the split, such as train or valid_2."""
    documents: range
    """Range of the documents to use."""
    max_length: int
    """Most tokens of sentences in a sample."""
    short_seq_prob: float
    """Share of samples with a shorter target [fraction]."""
    least: int
    """Sentences that a sample needs."""
    samples: int | None
    """How many are asked for, or None where passes are."""
    epochs: int
    """Passes over the documents; 0 where the samples decide."""
    seed: int
    """Seed of the order."""

    @cached_property
    def stem(self) -> str:
        """The file's path up to its ending."""
        public = f"{self.samples}mns_{self.max_length}msl_{self.short_seq_prob:0.2f}ssp_{self.seed}s"
        return f"{self.dataset.prefix}_{self.name}_indexmap_{public}_{self._digest()}"

    def paths(self) -> dict[str, Path]:
        """The file of each array."""
        return {"rows": Path(f"{self.stem}_sentence_idx.npy"), "passes": Path(f"{self.stem}_passes_idx.npy")}

    def build(self) -> SentenceMap:
        """Computes the map. ConfigError where no document can be used."""
        if not usable_documents(self._bounds, self.dataset.sentence_sizes, self.least).any():
            what = f"no document of {self.dataset.prefix} gives a sample of {self.name}: "
            raise ConfigError.of(
                what + ("none has two sentences" if self.least > 1 else "all are empty")
                if int(np.diff(self._bounds).max(initial=0)) < self.least
                else what + "each has a sentence of more than 512 tokens",
                key="bert_binary_head" if self.least > 1 else "data_path",
                value=True if self.least > 1 else self.dataset.prefix,
                hint="make the data with tools/preprocess_data.py --split-sentences"
                + (", or set bert_binary_head: false" if self.least > 1 else ""),
            )
        return build_sentence_map(
            self._bounds,
            self.dataset.sentence_sizes,
            max_length=self.max_length,
            short_seq_prob=self.short_seq_prob,
            least=self.least,
            seed=self.seed,
            samples=self.samples,
            epochs=self.epochs,
        )

    def checked(self, arrays: Mapping[str, np.ndarray]) -> SentenceMap | None:
        """Returns the map of stored arrays, or None where they cannot be it."""
        rows, passes = arrays["rows"], arrays["passes"]
        if rows.ndim != 2 or rows.shape[1] != 3 or len(rows) < (self.samples or 1) or passes.shape != (1,):
            return None
        part = rows if len(rows) <= _CHECKED else rows[:: len(rows) // _CHECKED]
        first, last = self._bounds[0], self._bounds[-1]
        sound = (part[:, 0] >= first) & (part[:, 0] < part[:, 1]) & (part[:, 1] <= last) & (part[:, 2] >= 2)
        return SentenceMap(rows, passes) if sound.all() else None

    @cached_property
    def _bounds(self) -> np.ndarray:
        return self.dataset.bounds[self.documents.start : self.documents.stop + 1]

    def _digest(self) -> str:
        found = hashlib.blake2b(np.ascontiguousarray(self.dataset.sentence_sizes).data, digest_size=DIGEST_BYTES)
        found.update(np.ascontiguousarray(self._bounds).data)
        found.update(f"{self.documents} epochs {self.epochs} least {self.least} {self.short_seq_prob!r}".encode())
        return found.hexdigest()


_CHECKED = 1 << 20
"""About as many rows of a stored map are looked at."""


class MaskedLoader(BatchLoader):
    """The micro-batches of one rank, of masked samples. A token whose label is not counted has label 0."""

    def __init__(self, samples: Samples, sampler: BatchSampler, *, segments: bool, **settings: Any) -> None:
        """Takes the samples of a rank.

        Args:
            samples: The data set.
            sampler: The rank's share of it.
            segments: Give token types, and the order of the segments.
            settings: Further settings of a `BatchLoader`.
        """
        super().__init__(samples, sampler, eod=0, **settings)
        self._segments = segments

    def _read(self, numbers: range) -> MicroBatch:
        shape = (len(numbers), self.samples.sample_length)
        tokens, labels = np.empty(shape, np.int64), np.empty(shape, np.int64)
        borders, types = np.zeros(shape, bool), np.empty(shape, np.int64)
        orders = np.empty((len(numbers), 1), np.int64)
        for row, number in enumerate(numbers):
            extras = SampleExtras(
                labels=labels[row], borders=borders[row], token_types=types[row], sentence_order=orders[row]
            )
            self.samples.read(number, tokens[row], extras)
        counted = labels >= 0
        inputs = torch.from_numpy(tokens)
        batch = MicroBatch(
            inputs,
            torch.from_numpy(labels * counted),
            torch.from_numpy(counted.astype(np.float32)),
            document_starts=document_starts(inputs, torch.from_numpy(borders), None),
            token_types=torch.from_numpy(types) if self._segments else None,
            sentence_order=torch.from_numpy(orders) if self._segments else None,
        )
        return batch.pin_memory() if self._pin_memory else batch
