"""Which tokens of a sample are masked, by the public rule.

The tokens of a word are masked together. The words come in random order; each starts an n-gram of 1 to max_ngram words,
with probability in proportion to 1 / n, which loses words until it fits into what is left to mask, and is skipped where
it overlaps one before. Of the chosen tokens 80 % become the mask, 10 % a random id and 10 % stay (arXiv:1810.04805,
section 3.1). All random numbers are those of one numpy RandomState, in the order of Megatron-Core, so that a sample
depends on its seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron.tokenizer_info import MaskingTokens

MASKED, RANDOM = 0.8, 0.5
"""Share of chosen tokens that become the mask, and of the others those that become a random id."""


@dataclass(frozen=True)
class MaskingRule:
    """The settings of masking."""

    tokens: MaskingTokens
    """Ids of the vocabulary."""
    mask_prob: float = 0.15
    """Share of the tokens of a sample that are chosen [fraction]."""
    max_ngram: int = 3
    """Most words that are chosen together."""

    @cached_property
    def _continues(self) -> np.ndarray:
        return np.frombuffer(self.tokens.continues, np.uint8)

    @cached_property
    def _ngram_bounds(self) -> np.ndarray:
        """Upper bounds of a number in [0, 1) that chooses 1, 2, ... words."""
        shares = 1.0 / np.arange(1, self.max_ngram + 1)
        shares /= shares.sum()
        bounds = (shares / shares.sum()).cumsum()
        return np.asarray(bounds / bounds[-1])

    def apply(self, tokens: np.ndarray, target: int, random: np.random.RandomState) -> np.ndarray:
        """Masks tokens in place; returns the positions of those that are to be predicted, ascending.

        Args:
            tokens: The sample without padding, int64.
            target: Length that it was made for [tokens].
            random: Source of all random numbers.
        """
        chosen: list[int] = []
        bounds = self._ngram_bounds

        def draw() -> int:
            return int(bounds.searchsorted(random.random_sample(), side="right")) + 1

        for positions in self._ngrams(tokens, target, random, draw):
            for position in positions:
                chosen.append(position)
                self._replace(tokens, position, random)
        return np.array(sorted(chosen), np.int64)

    def _ngrams(
        self, tokens: np.ndarray, target: int, random: np.random.RandomState, draw: Callable[[], int]
    ) -> Iterator[list[int]]:
        """Yields the positions of each n-gram that is chosen, until there are enough.

        Args:
            tokens: The sample without padding; not read after the first result.
            target: Length that it was made for [tokens].
            random: Source of random numbers.
            draw: Draws the words of an n-gram.
        """
        words, ends = self._words(tokens)
        limit = min(self.mask_prob * target, max(1, round(len(tokens) * self.mask_prob)))
        order = np.arange(len(ends) - 1)
        random.shuffle(order)
        last, chosen = len(ends) - 1, 0
        taken = np.zeros(last, bool)  # words
        for word in order.tolist():
            if chosen >= limit:
                return
            count = draw()
            while count and chosen + ends[min(word + count, last)] - ends[word] > limit:
                count -= 1
            if not count or taken[word : word + count].any():
                continue
            taken[word : word + count] = True
            positions = words[ends[word] : ends[min(word + count, last)]].tolist()
            chosen += len(positions)
            yield positions

    def _words(self, tokens: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Returns the positions of the tokens of all words, and where in them each word starts, and the end."""
        words = np.flatnonzero((tokens != self.tokens.cls) & (tokens != self.tokens.sep))
        begins = self._continues[tokens[words]] == 0
        begins[:1] = True
        return words, [*np.flatnonzero(begins).tolist(), len(words)]

    def _replace(self, tokens: np.ndarray, position: int, random: np.random.RandomState) -> None:
        if random.random_sample() < MASKED:
            tokens[position] = self.tokens.mask
        elif random.random_sample() >= RANDOM:
            tokens[position] = random.randint(0, self.tokens.vocab_size)


@dataclass(frozen=True)
class SpanRule(MaskingRule):
    """The settings of span corruption: an n-gram has a geometric number of words (SpanBERT, arXiv:1907.10529)."""

    max_ngram: int = 10
    """Most words of a span."""
    mean_words: float = 5.0
    """Mean of the geometric distribution, before it is cut off at max_ngram [words]."""
    most_spans: int = 100
    """Sentinels of the vocabulary."""
    room: int = 128
    """Most tokens of the decoder's input."""

    def spans(self, tokens: np.ndarray, target: int, random: np.random.RandomState) -> list[list[int]]:
        """Returns the positions of each span, in the order of the sample.

        There are no more than there are sentinels, and the decoder's input has room for all.

        Args:
            tokens: The sample.
            target: Length that it was made for [tokens].
            random: Source of all random numbers.
        """
        share, most = 1 / self.mean_words, self.max_ngram
        found: list[list[int]] = []
        length = 1  # the token that starts the decoder
        for positions in self._ngrams(tokens, target, random, lambda: min(int(random.geometric(share)), most)):
            length += 1 + len(positions)
            if length > self.room or len(found) == self.most_spans:
                break
            found.append(positions)
        return sorted(found)
