"""What samples of span corruption need in place of the samples of language models: index maps, data sets, loaders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron.config.derived.encoder_decoder import FRAME
from megatron.data.dataset.batch import MicroBatch
from megatron.data.dataset.document_starts import document_starts
from megatron.data.dataset.gpt_dataset import SampleExtras, Samples
from megatron.data.dataset.index_cache import MapRequest
from megatron.data.dataset.loader import BatchLoader
from megatron.data.dataset.masked_builder import SentenceRequest
from megatron.data.dataset.masked_dataset import MaskedSettings
from megatron.data.dataset.masking import SpanRule
from megatron.data.dataset.sampler import BatchSampler
from megatron.data.dataset.sources import DataSource, Split
from megatron.data.dataset.span_dataset import CorruptedSpans
from megatron.data.indexed.sentences import SentenceDataset
from megatron.tokenizer_info import SpanTokens


@dataclass(frozen=True)
class SpanData:
    """How the samples of span corruption are made."""

    tokens: SpanTokens
    """Ids of the vocabulary."""
    encoder_length: int
    """Tokens of the encoder's part of a sample."""
    decoder_length: int
    """Tokens of the decoder's part."""
    mask_prob: float = 0.15
    """Share of tokens that are to be predicted [fraction]."""
    max_words: int = 10
    """Most words of a span."""
    mean_words: float = 5.0
    """Mean words of a span, before they are cut off at max_words."""
    short_seq_prob: float = 0.1
    """Share of samples with a shorter target [fraction]."""

    def requests(self, split: Split, seq_length: int, seed: int) -> list[MapRequest]:
        """Returns the index map that each source of a split needs.

        Args:
            split: Split with its sources.
            seq_length: Not used: the lengths are those of both parts.
            seed: Seed of the order.
        """
        found: list[MapRequest] = []
        for source in split.sources:
            assert isinstance(source.dataset, SentenceDataset)
            found.append(
                SentenceRequest(
                    dataset=source.dataset,
                    name=source.name,
                    documents=source.documents,
                    max_length=self.encoder_length - FRAME,
                    short_seq_prob=self.short_seq_prob,
                    least=1,
                    samples=source.asked,
                    epochs=split.epochs,
                    seed=seed,
                )
            )
        return found

    def samples(self, source: DataSource, index: Any, seq_length: int, seed: int) -> Samples:
        """Returns the samples of a source.

        Args:
            source: The data set.
            index: Its index map.
            seq_length: Length of a sample, both parts together [tokens].
            seed: Seed of the run.
        """
        rule = SpanRule(
            self.tokens.words,
            self.mask_prob,
            self.max_words,
            self.mean_words,
            most_spans=len(self.tokens.sentinels),
            room=self.decoder_length,
        )
        settings = MaskedSettings(rule, seed, seq_length, sentence_order=False)
        return CorruptedSpans(source.data, index, settings, self.tokens, self.encoder_length)

    def loader(self, samples: Samples, sampler: BatchSampler, **settings: Any) -> BatchLoader:
        """Returns the loader of a rank.

        Args:
            samples: The data set.
            sampler: The rank's share of it.
            settings: Further settings of a `BatchLoader`.
        """
        return SpanLoader(samples, sampler, encoder_length=self.encoder_length, **settings)

    def order_facts(self) -> dict[str, Any]:
        """Returns the settings that decide which sample is number k, by their keys."""
        return {
            "mask_prob": self.mask_prob,
            "mask_max_ngram": self.max_words,
            "mask_mean_words": self.mean_words,
            "short_seq_prob": self.short_seq_prob,
            "encoder_seq_length": self.encoder_length,
        }


class SpanLoader(BatchLoader):
    """The micro-batches of one rank: tokens of both parts [b, s + u], labels of the decoder's [b, u]."""

    def __init__(self, samples: Samples, sampler: BatchSampler, *, encoder_length: int, **settings: Any) -> None:
        """Takes the samples of a rank.

        Args:
            samples: The data set.
            sampler: The rank's share of it.
            encoder_length: s [tokens].
            settings: Further settings of a `BatchLoader`.
        """
        super().__init__(samples, sampler, eod=0, **settings)
        self._encoder_length = encoder_length

    def _read(self, numbers: range) -> MicroBatch:
        shape = (len(numbers), self.samples.sample_length)
        tokens, labels, borders = np.empty(shape, np.int64), np.empty(shape, np.int64), np.zeros(shape, bool)
        for row, number in enumerate(numbers):
            self.samples.read(number, tokens[row], SampleExtras(labels=labels[row], borders=borders[row]))
        labels = labels[:, self._encoder_length :]
        counted = labels >= 0
        inputs = torch.from_numpy(tokens)
        batch = MicroBatch(
            inputs,
            torch.from_numpy(labels * counted),
            torch.from_numpy(counted.astype(np.float32)),
            document_starts=document_starts(inputs, torch.from_numpy(borders), None),
        )
        return batch.pin_memory() if self._pin_memory else batch
