"""Samples of the inverse cloze task (arXiv:1906.00300, section 4.1): a sentence, and the block of text it is from.

The query is a random sentence of the block, which the block keeps with probability `query_in_block_prob`. A sample is a
function of the data, the seed and its number alone.

Shapes: s sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.data.dataset.gpt_dataset import Origin, SampleExtras, TokenSource
from megatron.data.dataset.sentence_map import SentenceMap
from megatron.data.indexed.sentences import SentenceDataset
from megatron.data.retrieval.rows import framed, write_row
from megatron.errors import RunError
from megatron.tokenizer_info import ClassTokens

FRAME = 3
"""Tokens of a block's sample that are of no text: one before the title, one behind it and one behind the block."""


@dataclass(frozen=True)
class BlockSettings:
    """What samples depend on besides the data."""

    tokens: ClassTokens
    """Ids of separators and padding."""
    vocab_size: int
    """Number of ids [tokens]."""
    seed: int
    """Seed of the run."""
    seq_length: int
    """Length of a sequence [tokens]."""
    query_in_block_prob: float
    """Share of blocks that keep the sentence of the query [fraction]."""


def title_length(size: int, seq_length: int) -> int:
    """Returns how many tokens of a title are in a sample, at most half of it.

    size: of the title [tokens]. seq_length: of a sample [tokens].
    """
    return min(size, seq_length // 2)


class SentencesAndBlocks:
    """The samples of one data set."""

    def __init__(
        self, source: TokenSource, titles: SentenceDataset | None, index: SentenceMap, settings: BlockSettings
    ) -> None:
        """Takes the data.

        Args:
            source: documents of sentences.
            titles: the title of each document; None for none.
            index: which sentences make which block.
            settings: what samples depend on besides.
        """
        assert isinstance(source.tokens, SentenceDataset)
        self._source, self._data, self._titles, self._settings = source, source.tokens, titles, settings
        self._rows, self.sample_length = index.rows, 2 * settings.seq_length

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Returns the ids of a sample's query, its block and its title, which are not cut but for the title."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of a data set that has {len(self)}")
        first, end, document, _ = self._rows[number].tolist()
        settings = self._settings
        random = np.random.RandomState((settings.seed + number) % (1 << 32))
        chosen = first + int(random.randint(0, end - first))
        keeps = random.random_sample() < settings.query_in_block_prob or end - first == 1
        title = None if self._titles is None else self._titles.get(document)
        if title is not None:
            title = title[: title_length(len(title), settings.seq_length)]
        taken = [sentence for sentence in range(first, end) if keeps or sentence != chosen]
        block = np.concatenate([self._sentence(sentence) for sentence in taken])
        query = self._sentence(chosen)
        for part in (query, block, *([] if title is None else [title])):
            self._check(part, document)
        return query, block, title

    def read(self, number: int, tokens: np.ndarray, extras: SampleExtras | None = None) -> None:
        """Writes the sample's query and block, each with padding [2 s], and where they and the padding begin."""
        query, block, title = self.texts(number)
        ids, length = self._settings.tokens, self._settings.seq_length
        borders = np.zeros(len(tokens), bool) if extras is None or extras.borders is None else extras.borders
        for start, text, named in ((0, query, None), (length, block, title)):
            part = slice(start, start + length)
            write_row(tokens[part], borders[part], framed(ids, text, named, length), ids.pad)

    def origin(self, number: int, position: int) -> Origin:
        """The document of the sample's block."""
        return Origin(self._source, int(self._rows[number, 2]))

    def _sentence(self, sentence: int) -> np.ndarray:
        start = self._data.sentence_starts.item(sentence) // self._data.dtype.itemsize
        return self._data.tokens[start : start + self._data.sentence_sizes.item(sentence)]

    def _check(self, tokens: np.ndarray, document: int) -> None:
        """Raises RunError for an id that is no token's."""
        limit = self._settings.vocab_size
        wrong = tokens[(tokens >= limit) | (tokens < 0)] if len(tokens) else tokens
        if len(wrong):
            raise RunError.of(
                f"document {document} holds the id {int(wrong[0])}, and the tokenizer's ids are 0 to {limit - 1}",
                location=self._data.prefix,
                hint="another tokenizer made this data: give the run that one, or make the data again",
            )
