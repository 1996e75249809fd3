"""Samples made of documents: joined end to end and cut anywhere, or whole and padded.

Everything that goes with a token (its label, its document's reward) is read by the same pieces as the token itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from megatron.data.dataset.index_map import IndexMap
from megatron.data.indexed.reader import IGNORE_INDEX, IndexedDataset

PADDING = 0
"""The token after the last document of a sample that is not full; its label is IGNORE_INDEX."""


class SampleExtras(NamedTuple):
    """Where a sample's other facts go, arrays of sample_length or None where they are not wanted.

    labels: int64, the tokens, or IGNORE_INDEX where one is not to be predicted. rewards: float32, of each token's
    document. borders: bool and False before, set to True where a document, a part of one or the padding starts.
    padding: bool and False before, set to True behind the last document. token_types: int64, 1 in the second segment of
    a masked sample. sentence_order: int64 [1], whether its segments are swapped.
    """

    labels: np.ndarray | None = None
    rewards: np.ndarray | None = None
    borders: np.ndarray | None = None
    padding: np.ndarray | None = None
    token_types: np.ndarray | None = None
    sentence_order: np.ndarray | None = None


class Origin(NamedTuple):
    """The data set and the document in it that a token of a sample comes from."""

    source: TokenSource
    document: int


class Samples(Protocol):
    """Numbered samples of equal length. sample_length: [tokens], one more than the sequence length."""

    @property
    def sample_length(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, number: int, tokens: np.ndarray, extras: SampleExtras | None = None) -> None:
        """Writes sample `number` into tokens, an integer array of sample_length tokens, and into the extras."""
        ...

    def origin(self, number: int, position: int) -> Origin:
        """Where the token at a place of sample `number` comes from."""
        ...


@dataclass(frozen=True)
class TokenSource:
    """A data set and what goes with it: labels token by token, rewards with one number a document."""

    tokens: IndexedDataset
    """The token files."""
    labels: IndexedDataset | None = None
    """Label of each token, if any."""
    rewards: IndexedDataset | None = None
    """Reward of each document, if any."""


Span = tuple[int, int, int, int]
"""Tokens of one document: place in the sample, first token in the file, how many, number of the document."""


class PackedDataset:
    """Samples of an indexed data set in the order of an index map (index_map.py says which tokens they hold)."""

    def __init__(self, source: TokenSource | IndexedDataset, index: IndexMap, seq_length: int) -> None:
        self._source = source if isinstance(source, TokenSource) else TokenSource(source)
        self._index = index
        self.sample_length = seq_length + 1
        dataset = self._source.tokens
        self._flat, self._sizes, self._starts = dataset.tokens, dataset.sizes, dataset.starts
        self._item_bytes = dataset.dtype.itemsize

    def __len__(self) -> int:
        return len(self._index)

    def read(self, number: int, tokens: np.ndarray, extras: SampleExtras | None = None) -> None:
        """Writes the sample's tokens, and what else is asked for."""
        if not 0 <= number < len(self._index.shuffle):
            raise IndexError(f"sample {number} of a data set that has {len(self)}")
        spans = self._spans(self._index.shuffle.item(number))
        flat, filled = self._flat, 0
        for at, first, length, _ in spans:
            filled = at + length
            tokens[at:filled] = flat[first : first + length]
        if filled < self.sample_length:
            tokens[filled:] = PADDING
        if extras is not None:
            self._read_extras(spans, filled, tokens, extras)

    def origin(self, number: int, position: int) -> Origin:
        """Where the token at a place of sample `number` comes from; the last document for padding."""
        spans = self._spans(self._index.shuffle.item(number))
        return Origin(self._source, next(span[3] for span in reversed(spans) if span[0] <= position and span[2]))

    def documents(self, number: int) -> set[Origin]:
        """The documents that sample `number` has tokens of."""
        return {Origin(self._source, span[3]) for span in self._spans(self._index.shuffle.item(number)) if span[2]}

    def __getitem__(self, number: int) -> np.ndarray:
        """The sample's tokens, int64 [seq_length + 1]."""
        tokens = np.empty(self.sample_length, np.int64)
        self.read(number, tokens)
        return tokens

    def _spans(self, row: int) -> list[Span]:
        """The sample before shuffling: its pieces, one after another from place 0."""
        position, offset = self._index.samples.item(row, 0), self._index.samples.item(row, 1)
        documents, sizes, starts = self._index.documents, self._sizes, self._starts
        spans: list[Span] = []
        at, end = 0, self.sample_length
        while at < end:
            document = documents.item(position)
            length = min(end - at, sizes.item(document) - offset)
            spans.append((at, starts.item(document) // self._item_bytes + offset, length, document))
            at += length
            position, offset = position + 1, 0
        return spans

    def _read_extras(self, spans: list[Span], filled: int, tokens: np.ndarray, extras: SampleExtras) -> None:
        labels, rewards = self._source.labels, self._source.rewards
        for at, first, length, document in spans:
            own = slice(at, at + length)
            if extras.borders is not None and length:
                extras.borders[at] = True
            if extras.labels is not None:
                extras.labels[own] = tokens[own] if labels is None else labels.tokens[first : first + length]
            if extras.rewards is not None:
                extras.rewards[own] = 0 if rewards is None else rewards.get(document, 0, 1)
        if filled < self.sample_length:
            values = (extras.borders, True), (extras.padding, True), (extras.labels, IGNORE_INDEX), (extras.rewards, 0)
            for array, value in values:
                if array is not None:
                    array[filled:] = value


class UnpackedDataset(PackedDataset):
    """Samples of whole documents, padded at the end (packing.py says which documents they hold)."""

    def _spans(self, row: int) -> list[Span]:
        position, end = self._index.samples.item(row, 0), self._index.samples.item(row + 1, 0)
        spans: list[Span] = []
        at = 0
        for document in self._index.documents[position:end].tolist():
            length = min(self.sample_length - at, self._sizes.item(document))
            spans.append((at, self._starts.item(document) // self._item_bytes, length, document))
            at += length
        return spans
