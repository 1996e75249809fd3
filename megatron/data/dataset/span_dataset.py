"""Samples of span corruption (T5, arXiv:1910.10683, section 3.1.4), in the form of Megatron-Core.

The encoder reads a text in which a sentinel stands for each span. The decoder reads the start token and, for each span,
its sentinel and its tokens; it predicts the same one token earlier, and the end token last. Behind either is padding.

Shapes: s encoder tokens, u decoder tokens. A sample is a function of the data, the seed and its number alone.
"""

from __future__ import annotations

import numpy as np

from megatron.data.dataset.gpt_dataset import SampleExtras, TokenSource
from megatron.data.dataset.masked_dataset import MaskedSettings, SentencePairs
from megatron.data.dataset.masking import SpanRule
from megatron.data.dataset.sentence_map import SentenceMap
from megatron.data.indexed.reader import IGNORE_INDEX
from megatron.tokenizer_info import SpanTokens


class CorruptedSpans(SentencePairs):
    """Samples of s + u tokens: the encoder's, then the decoder's."""

    def __init__(
        self,
        source: TokenSource,
        index: SentenceMap,
        settings: MaskedSettings,
        tokens: SpanTokens,
        encoder_length: int,
    ) -> None:
        """Takes a data set.

        Args:
            source: The data set.
            index: Which sentences make which sample.
            settings: The rule, the seed and the length of a sample.
            tokens: Special tokens of the vocabulary.
            encoder_length: s [tokens].
        """
        super().__init__(source, index, settings)
        assert isinstance(settings.rule, SpanRule)
        self._rule, self._tokens, self._encoder_length = settings.rule, tokens, encoder_length

    def read(self, number: int, tokens: np.ndarray, extras: SampleExtras | None = None) -> None:
        """Writes the sample's tokens [s + u], and what else is asked for: labels, and borders of the encoder's part."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of a data set that has {len(self)}")
        first, end, target = self._rows[number].tolist()
        text = self._sentences(first, end)[:target]
        self._check(text, self._document(first))
        spans = self._rule.spans(text, target, self._random(number))
        given, ids, at = self._tokens, text.tolist(), 0
        encoder, decoder = list[int](), list[int]()
        for sentinel, positions in zip(given.sentinels, spans, strict=False):
            encoder += [*ids[at : positions[0]], sentinel]
            decoder += [sentinel, *(ids[position] for position in positions)]
            at = positions[-1] + 1
        encoder += ids[at:]
        if given.source_end is not None:
            encoder.append(given.source_end)
        extras, length = extras or SampleExtras(), self._encoder_length
        tokens[:] = given.words.pad
        tokens[: len(encoder)] = encoder
        tokens[length] = given.start
        tokens[length + 1 : length + 1 + len(decoder)] = decoder
        if extras.labels is not None:
            extras.labels[:] = IGNORE_INDEX
            extras.labels[length : length + len(decoder)] = decoder
            extras.labels[length + len(decoder)] = given.end
        if extras.borders is not None:
            extras.borders[[0, length, *([len(encoder)] if len(encoder) < length else [])]] = True
        if extras.padding is not None:
            extras.padding[len(encoder) : length] = True
            extras.padding[length + 1 + len(decoder) :] = True
