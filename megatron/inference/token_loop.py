"""The token loop: texts of different lengths grow side by side, one token a step.

A text joins the loop when a row of the cache is free and leaves it when it ends, so a long text never waits for others
and others never wait for it (continuous batching, as in Orca, OSDI 2022). The rows in use are always the first ones;
the last row moves into the gap that a text leaves. Greedy text does not depend on what else is in the batch, up to the
rounding of differently shaped matrix products.

The loop runs alike on every rank that holds a part of the model: the scores are the same there, and so are the choices.

b batch, s sequence, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.engine.engine import Engine
from megatron.inference.sampling import NO_TOKEN, Sampler, choose_all
from megatron.model.kv_cache import KVCache

PROMPT_TOKENS = 4096
"""Most tokens, padding included, of the prompts that run through the model together."""


@dataclass(frozen=True)
class Limits:
    """Where a text ends: at one of `ends`, after `maximum_tokens` new tokens, or at `seq_length` tokens in all."""

    ends: frozenset[int]
    """Ids that end a sequence."""
    maximum_tokens: int
    """Most new tokens."""
    seq_length: int
    """Most tokens in all."""

    def room(self, prompt_tokens: int) -> int:
        """How many tokens may follow a prompt of that length."""
        return max(0, min(self.maximum_tokens, self.seq_length - prompt_tokens))


class RunningSequence:
    """A text that grows: tokens are its prompt, of at least one token, and what has followed.

    limits: where it ends. sampler: how its tokens are chosen. failed: whether it ended because the model's scores are
    no numbers.
    """

    def __init__(self, prompt: Sequence[int], limits: Limits, sampler: Sampler) -> None:
        if not prompt:
            raise ValueError("a text starts with at least one token")
        self.tokens = list(prompt)
        self.sampler = sampler
        self._limits = limits
        self._end = len(self.tokens) + limits.room(len(self.tokens))
        self.ended = len(self.tokens) >= self._end
        self.failed = False

    @property
    def longest(self) -> int:
        """The most tokens that the text can have, prompt included."""
        return self._end

    def end(self) -> None:
        """Nothing more is wanted: the text leaves its loop before the next step."""
        self.ended = True

    def add(self, token: int) -> None:
        """One more token, which may be the last one. NO_TOKEN ends the text as it is, and it has failed."""
        if token == NO_TOKEN:
            self.ended = self.failed = True
            return
        self.tokens.append(token)
        self.ended = token in self._limits.ends or len(self.tokens) >= self._end


@dataclass(frozen=True)
class Step:
    """One new token of a text, NO_TOKEN where none could be chosen, and the scores [v] that it was chosen from."""

    text: RunningSequence
    """The sequence."""
    token: int
    """Its new token."""
    logits: Tensor
    """The logits that it was chosen from, [v]."""


class TokenLoop:
    """The texts in progress. Collective: every rank of the model calls the same methods with equal texts.

    Args:
        engine: Computes logits.
        rows: Largest number of texts at a time.
        max_length: Largest number of tokens of a text.
        cached: True if keys and values are cached; otherwise each token costs a pass over the full text.
    """

    def __init__(self, engine: Engine, *, rows: int, max_length: int, cached: bool = True) -> None:
        self._engine = engine
        self._cache = engine.new_cache(rows, max_length) if cached else None
        self.rows = rows
        self.texts: list[RunningSequence] = []

    @property
    def free(self) -> int:
        """How many texts may join."""
        return self.rows - sum(not text.ended for text in self.texts)

    def join(self, texts: Sequence[RunningSequence]) -> list[Step]:
        """Takes texts in, at most `free`, and returns the first new token of each; those that end with it are out."""
        self._drop_ended()
        if len(texts) > self.free:
            raise ValueError(f"{len(texts)} texts do not fit {self.free} free rows")
        steps: list[Step] = []
        for group in _groups(texts):
            first = len(self.texts)
            cache = None if self._cache is None else self._cache.rows(first, len(group))
            if cache is not None:
                cache.reset()
                cache.set_valid_lengths([cache.prompt + len(text.tokens) for text in group])
            tokens, last = _padded([text.tokens for text in group])
            self.texts += group
            steps += self._choose(group, self._read(group, tokens, cache, last))
        return steps

    def _read(self, texts: Sequence[RunningSequence], tokens: Tensor, cache: KVCache | None, last: Tensor) -> Tensor:
        """The scores [b, v] behind prompts [b, s]. last: where each of them ends in the flattened [b, s]."""
        return self._engine.logits(tokens, cache, last)

    def step(self) -> list[Step]:
        """One more token for every text, or for some of them; those that end with it are out."""
        self._drop_ended()
        texts = list(self.texts)
        if not texts:
            return []
        if self._cache is None:
            tokens, last = _padded([text.tokens for text in texts])
            return self._choose(texts, self._engine.logits(tokens, None, last))
        cache = self._cache.rows(0, len(texts))
        cache.set_lengths([held(text, cache) for text in texts])
        tokens = torch.tensor([text.tokens[-1:] for text in texts])  # [b, 1]
        return self._choose(texts, self._engine.logits(tokens, cache)[:, 0])

    @torch.no_grad()
    def scores_of(self, tokens: Sequence[int]) -> Tensor:
        """The scores [tokens - 1, v] of each token but the first, from those before it; at least two tokens."""
        return self._engine.logits(torch.tensor([list(tokens)]), None, torch.arange(len(tokens) - 1))

    def leave(self, text: RunningSequence) -> None:
        """Drops a text; its row is free at once."""
        at = self.texts.index(text)
        if text.failed:
            for cache in self._caches():
                cache.clear(at)
        last = self.texts.pop()
        if last is text:
            return
        self.texts[at] = last
        for cache in self._caches():
            cache.lengths[len(self.texts)] = self._stored(last, cache)
            cache.move(len(self.texts), at)

    def _caches(self) -> list[KVCache]:
        """Every cache with a row for each text."""
        return [] if self._cache is None else [self._cache]

    def _stored(self, text: RunningSequence, cache: KVCache) -> int:
        """Positions of a text whose memory is still needed."""
        return held(text, cache)

    @torch.no_grad()
    def _choose(self, texts: Sequence[RunningSequence], logits: Tensor) -> list[Step]:
        """The next token of each text from its scores [b, v]."""
        tokens = choose_all([text.sampler for text in texts], logits, [text.tokens for text in texts])
        steps = [Step(text, token, row) for text, token, row in zip(texts, tokens, logits.unbind(), strict=True)]
        for step in steps:
            step.text.add(step.token)
        self._drop_ended()
        return steps

    def _drop_ended(self) -> None:
        for text in [text for text in self.texts if text.ended]:
            self.leave(text)


def held(text: RunningSequence, cache: KVCache) -> int:
    """Positions of a text that its row holds: all but the last token's, which has not run through the model yet."""
    return cache.prompt + len(text.tokens) - 1


def decode(
    engine: Engine,
    texts: Sequence[RunningSequence],
    *,
    rows: int,
    cached: bool = True,
    make: Callable[..., TokenLoop] = TokenLoop,
) -> Iterator[Step]:
    """Grows all texts to their end, at most `rows` at a time, the longest prompts first.

    Yields the new tokens, step by step; tokens of one text come in order.

    Args:
        engine: Computes logits.
        texts: Sequences to continue.
        rows: Largest number of texts at a time.
        cached: True if keys and values are cached.
        make: Makes the loop.
    """
    waiting = sorted((text for text in texts if not text.ended), key=lambda text: -len(text.tokens))
    if not waiting:
        return
    longest = max(text.longest for text in waiting)
    loop = make(engine, rows=min(rows, len(waiting)), max_length=longest, cached=cached)
    while waiting or loop.free < loop.rows:
        joining, waiting = waiting[: loop.free], waiting[loop.free :]
        yield from loop.join(joining) if joining else loop.step()


def _groups(texts: Sequence[RunningSequence]) -> Iterator[list[RunningSequence]]:
    """The texts in order, parted so that no group has more than PROMPT_TOKENS tokens when padded."""
    group: list[RunningSequence] = []
    longest = 0
    for text in texts:
        longest = max(longest, len(text.tokens))
        if group and longest * (len(group) + 1) > PROMPT_TOKENS:
            yield group
            group, longest = [], len(text.tokens)
        group.append(text)
    if group:
        yield group


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one tensor [b, s], padded behind their ends, and the place of each last token in [b * s].

    Attention is causal, so no token sees the padding; what the cache keeps of it is written over later. It is the
    row's own last token, so that no row depends on a token that it does not have.
    """
    longest = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
    return tokens, torch.tensor([at * longest + len(row) - 1 for at, row in enumerate(rows)])
