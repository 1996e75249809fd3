"""Masked samples of BERT: sentences of one document, or whole documents one after another.

Shapes: s sequence. A sample is a function of the data, the seed and its number alone.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from megatron.data.dataset.gpt_dataset import Origin, SampleExtras, TokenSource
from megatron.data.dataset.index_map import IndexMap
from megatron.data.dataset.masking import MaskingRule
from megatron.data.dataset.sentence_map import SentenceMap
from megatron.data.indexed.reader import IGNORE_INDEX
from megatron.data.indexed.sentences import SentenceDataset
from megatron.errors import RunError

FRAME = 3
"""Tokens of a padded sample that are of no sentence: one before the first segment, one behind each."""


@dataclass(frozen=True)
class MaskedSettings:
    """What samples depend on besides the data."""

    rule: MaskingRule
    """Which tokens are masked."""
    seed: int
    """Seed of the run."""
    seq_length: int
    """Length of a sample [tokens]."""
    sentence_order: bool
    """Samples have two segments, in half of them in the wrong order (arXiv:1909.11942, section 3.1)."""


class _Masked:
    """What both kinds of samples share."""

    def __init__(self, source: TokenSource, settings: MaskedSettings) -> None:
        assert isinstance(source.tokens, SentenceDataset)
        self._source, self._data, self._settings = source, source.tokens, settings
        self.sample_length, self._of_thread = settings.seq_length, threading.local()
        self._flat, self._item_bytes = source.tokens.tokens, source.tokens.dtype.itemsize

    def _random(self, number: int) -> np.random.RandomState:
        """Returns this thread's generator with the seed of a sample; making a new one would take twice as long."""
        seed = (self._settings.seed + number) % (1 << 32)
        found: np.random.RandomState | None = getattr(self._of_thread, "random", None)
        if found is None:
            found = self._of_thread.random = np.random.RandomState(seed)
        found.seed(seed)
        return found

    def _mask(
        self,
        filled: np.ndarray,
        target: int,
        random: np.random.RandomState,
        labels: np.ndarray | None,
    ) -> None:
        """Masks the tokens of a sample in place, and writes the labels.

        Args:
            filled: The tokens without padding, a view of the sample.
            target: Length that the sample was made for [tokens].
            random: Source of random numbers.
            labels: The labels of the full sample, or None.
        """
        before = filled.copy()
        positions = self._settings.rule.apply(filled, target, random)
        if labels is not None:
            labels[:] = IGNORE_INDEX
            labels[positions] = before[positions]

    def _check(self, tokens: np.ndarray, document: int) -> None:
        """Raises RunError for an id that is no token's."""
        limit = self._settings.rule.tokens.vocab_size
        if len(tokens) and (int(tokens.max()) >= limit or int(tokens.min()) < 0):
            wrong = int(tokens[(tokens >= limit) | (tokens < 0)][0])
            raise RunError.of(
                f"document {document} holds the id {wrong}, and the tokenizer's ids are 0 to {limit - 1}",
                location=self._data.prefix,
                hint="another tokenizer made this data: give the run that one, or make the data again",
            )


class SentencePairs(_Masked):
    """Padded samples of the sentences of one document: [CLS] A [SEP] B [SEP], or [CLS] A [SEP] without an order.

    A is the sentences before a random one and B the others; in half of the samples they are swapped, which is what the
    binary head learns to see. Too many tokens are taken off both ends of the longer segment at random.
    """

    def __init__(self, source: TokenSource, index: SentenceMap, settings: MaskedSettings) -> None:
        super().__init__(source, settings)
        self._rows = index.rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, number: int, tokens: np.ndarray, extras: SampleExtras | None = None) -> None:
        """Writes the sample's tokens [s], and what else is asked for."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of a data set that has {len(self)}")
        first, end, target = self._rows[number].tolist()
        random, ids, extras = self._random(number), self._settings.rule.tokens, extras or SampleExtras()
        pivot, swapped = end, False
        if self._settings.sentence_order:
            pivot = first + (int(random.randint(1, end - first)) if end - first >= 3 else 1)
            swapped = random.random_sample() < 0.5
        a, b = self._sentences(first, pivot), self._sentences(pivot, end)
        a, b = _shortened(b, a, target, random) if swapped else _shortened(a, b, target, random)
        middle = len(a) + 2
        filled = middle + (len(b) + 1 if len(b) else 0)
        tokens[0], tokens[middle - 1], tokens[1 : middle - 1] = ids.cls, ids.sep, a
        if len(b):
            tokens[middle : filled - 1], tokens[filled - 1] = b, ids.sep
        self._check(tokens[:filled], self._document(first))
        tokens[filled:] = ids.pad
        self._mask(tokens[:filled], target, random, extras.labels)
        if extras.token_types is not None:
            extras.token_types[:] = 0
            extras.token_types[middle:filled] = 1
        if extras.borders is not None:
            extras.borders[[0, *([filled] if filled < len(tokens) else [])]] = True
        if extras.padding is not None:
            extras.padding[filled:] = True
        if extras.sentence_order is not None:
            extras.sentence_order[:] = swapped

    def origin(self, number: int, position: int) -> Origin:
        """The document of the sample's sentences."""
        return Origin(self._source, self._document(int(self._rows[number, 0])))

    def _document(self, sentence: int) -> int:
        return int(np.searchsorted(self._data.bounds, sentence, side="right")) - 1

    def _sentences(self, first: int, end: int) -> np.ndarray:
        """Returns the tokens of sentences that follow each other."""
        starts, sizes = self._data.sentence_starts, self._data.sentence_sizes
        if first == end:
            return self._flat[:0]
        begin = starts.item(first) // self._item_bytes
        stop = starts.item(end - 1) // self._item_bytes + sizes.item(end - 1)
        return self._flat[begin:stop]


def _shortened(
    a: np.ndarray, b: np.ndarray, target: int, random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the segments with at most `target` tokens together.

    Args:
        a: First segment.
        b: Second segment; it is the one to lose a token where both are equally long.
        target: Most tokens.
        random: One number for each token that is taken off: below 0.5 the first one of its segment, else the last one.
    """
    excess = len(a) + len(b) - target
    if excess <= 0:
        return a, b
    bounds = [[0, len(a)], [0, len(b)]]
    for number in random.random_sample(excess).tolist():
        longer = bounds[0] if bounds[0][1] - bounds[0][0] > bounds[1][1] - bounds[1][0] else bounds[1]
        if number < 0.5:
            longer[0] += 1
        else:
            longer[1] -= 1
    return a[slice(*bounds[0])], b[slice(*bounds[1])]


class PackedDocuments(_Masked):
    """Samples without padding: documents, each as [CLS] document [SEP], joined in shuffled order and cut anywhere.

    index_map.py says which tokens a sample holds, for documents that are FRAMED tokens longer. Attention sees the own
    document only, so a document that a cut divides is two to the model.
    """

    FRAMED = 2

    def __init__(self, source: TokenSource, index: IndexMap, settings: MaskedSettings) -> None:
        super().__init__(source, settings)
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def read(self, number: int, tokens: np.ndarray, extras: SampleExtras | None = None) -> None:
        """Writes the sample's tokens [s], and what else is asked for."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of a data set that has {len(self)}")
        ids, extras = self._settings.rule.tokens, extras or SampleExtras()
        for at, document, offset, length in self._spans(number):
            first = self._data.starts.item(document) // self._item_bytes
            size = self._data.sizes.item(document)
            own = tokens[at : at + length]
            begin, stop = max(offset - 1, 0), min(offset + length - 1, size)
            lead = int(offset == 0)
            own[lead : lead + stop - begin] = self._flat[first + begin : first + stop]
            if lead:
                own[0] = ids.cls
            if offset + length == size + self.FRAMED:
                own[-1] = ids.sep
            self._check(own, document)
            if extras.borders is not None:
                extras.borders[at] = True
        self._mask(tokens, self.sample_length, self._random(number), extras.labels)
        if extras.token_types is not None:
            extras.token_types[:] = 0

    def origin(self, number: int, position: int) -> Origin:
        """Where the token at a place of sample `number` comes from."""
        found = next(span for span in reversed(self._spans(number)) if span[0] <= position)
        return Origin(self._source, found[1])

    def _spans(self, number: int) -> list[tuple[int, int, int, int]]:
        """Returns place in the sample, document, offset in its framed tokens and length of each part."""
        row = self._index.shuffle.item(number)
        position, offset = self._index.samples.item(row, 0), self._index.samples.item(row, 1)
        spans, at = [], 0
        while at < self.sample_length:
            document = self._index.documents.item(position)
            length = min(self.sample_length - at, self._data.sizes.item(document) + self.FRAMED - offset)
            spans.append((at, document, offset, length))
            at, position, offset = at + length, position + 1, 0
        return spans
