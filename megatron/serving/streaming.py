"""From the decoding thread to a request's coroutine: pieces, tokens and outcomes of a request's texts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron.inference.generation_request import GenerationResult, Settings
from megatron.serving.scheduler import Callbacks, Service
from megatron.serving.token_text import TokenOffsets, Words

_BEHIND = 32
"""Events from which on a reader is too slow for one at a time."""


@dataclass(frozen=True)
class Keep:
    """What is wanted besides text."""

    vocabulary: int
    """The ids that exist; others have no probability [tokens]."""
    tokens: bool = False
    """The single tokens of the answers."""
    likeliest: int | None = None
    """Their log-probabilities, and those of so many others there."""
    prompt: bool = False
    """The same of the prompts' tokens."""
    ends: bool = False
    """The tokens that end answers, behind theirs."""


@dataclass(frozen=True)
class TokenScore:
    """One token.

    place: where it begins in the text [characters].
    """

    token: int
    """The token id."""
    offset: int
    """Offset of its text in the text [characters]."""
    log_probability: float | None = None
    """None where it is not known, as of a prompt's first token [nats]."""
    likeliest: dict[int, float] | None = None
    """The log-probabilities of the likeliest tokens there, the largest first, and of this one."""


@dataclass(frozen=True)
class Event:
    """What happened to text `index` of a request: a piece of it, its outcome, or both, and the tokens that it holds."""

    index: int
    """Number of the sequence in its request."""
    piece: str = ""
    """New text."""
    record: GenerationResult | None = None
    """The result, once it has ended."""
    tokens: tuple[TokenScore, ...] = ()
    """New tokens with their scores."""


class Growing:
    """One sequence of a request on the decoding thread: turns its callbacks into events, tokens with their text.

    Args:
        index: Number of the sequence in the request.
        keep: Records that the request asks for.
        offsets: Offsets of tokens in the text.
        put: Takes the events.
    """

    def __init__(self, index: int, keep: Keep, offsets: TokenOffsets, put: Callable[[Event], None]) -> None:
        self._index, self._keep, self._offsets, self._put = index, keep, offsets, put
        self._held: deque[TokenScore] = deque()
        self._released = 0

    def token(self, number: int, logits: Tensor) -> None:
        """A token that belongs to the text, before its text does. logits [v]."""
        if not self._keep.tokens and self._keep.likeliest is None:
            return
        found = TokenScore(number, self._offsets.add(number))
        if self._keep.likeliest is not None:
            log_probabilities = logits[: self._keep.vocabulary].float().log_softmax(-1)
            found = _scored([found], log_probabilities[None], self._keep.likeliest)[0]
        self._held.append(found)

    def end(self, number: int, logits: Tensor) -> None:
        """The token that ends the text, and is none of it. logits [v]."""
        if self._keep.ends:
            self.token(number, logits)

    def piece(self, text: str) -> None:
        """A piece of the text, which no later token changes."""
        self._released += len(text)
        self._put(Event(self._index, piece=text, tokens=self._up_to(self._released)))

    def done(self, record: GenerationResult) -> None:
        """The outcome. Tokens behind a stop text's begin are left out."""
        rest = self._up_to(len(record.text or "")) if record.cut else tuple(self._held)
        self._put(Event(self._index, record=record, tokens=rest))

    def _up_to(self, offset: int) -> tuple[TokenScore, ...]:
        found = []
        while self._held and self._held[0].offset < offset:
            found.append(self._held.popleft())
        return tuple(found)


def _together(events: Sequence[Event]) -> Event:
    """What happened to one text, as one event; nothing happens after its outcome."""
    tokens = tuple(token for event in events for token in event.tokens)
    return Event(events[0].index, "".join(event.piece for event in events), events[-1].record, tokens)


@dataclass
class PendingRequest:
    """The texts of one request in progress."""

    service: Service
    """The scheduler."""
    numbers: list[int]
    """Numbers of its sequences in the scheduler."""
    queue: asyncio.Queue[Event]
    """Events of its sequences."""
    prompts: list[list[TokenScore]]
    """The tokens of each prompt with their scores, where asked for."""
    prompt_tokens: int = 0
    """Of all different prompts [tokens]."""
    tokens: list[list[TokenScore]] = field(default_factory=list)
    """Of each text, so far."""
    records: dict[int, GenerationResult] = field(default_factory=dict)
    """Results so far."""

    async def events(self) -> AsyncIterator[Event]:
        """Everything that happens until all texts are done; abandons them when the reader stops early."""
        try:
            while len(self.records) < len(self.numbers):
                for event in await self._next():
                    self.tokens[event.index] += event.tokens
                    if event.record is not None:
                        self.records[event.index] = event.record
                    yield event
        finally:
            self.abandon()

    async def _next(self) -> list[Event]:
        """The next event; where the reader has fallen behind, one for each text of all that there are."""
        events = [await self.queue.get()]
        if self.queue.qsize() < _BEHIND:
            return events
        events += [self.queue.get_nowait() for _ in range(self.queue.qsize())]
        found: dict[int, list[Event]] = {}
        for event in events:
            found.setdefault(event.index, []).append(event)
        return [_together(each) for each in found.values()]

    def abandon(self) -> None:
        """The client disconnected."""
        if len(self.records) < len(self.numbers):
            self.service.abandon(self.numbers)

    async def all(self, gone: Callable[[], object]) -> list[GenerationResult] | None:
        """The outcomes in order; None when the client has gone. gone: a coroutine function that says so."""
        reading = asyncio.ensure_future(self._read())
        try:
            while not reading.done():
                await asyncio.wait({reading}, timeout=0.25)
                if not reading.done() and await gone():  # type: ignore[misc]
                    return None
        finally:
            if not reading.done():
                reading.cancel()
                self.abandon()
        return [self.records[index] for index in range(len(self.numbers))]

    async def _read(self) -> None:
        async for _ in self.events():
            pass


def start(
    service: Service, words: Words, prompts: Sequence[Sequence[int]], settings: Sequence[Settings], keep: Keep
) -> PendingRequest:
    """Hands a request's texts in. Raises Full or Closing.

    Args:
        service: The scheduler.
        words: Texts of single tokens.
        prompts: Token ids of each prompt.
        settings: Generation settings of each prompt.
        keep: What is wanted besides their text.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event] = asyncio.Queue()
    scored: list[list[TokenScore]] = [[TokenScore(tokens[0], 0)] for tokens in prompts]

    def put(event: Event) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)

    def listener(index: int) -> Callbacks:
        tokens = prompts[index]
        growing = Growing(index, keep, words.offsets(tokens), put)

        def prompt(scores: Tensor) -> None:
            plain = [TokenScore(token, 0) for token in tokens[1:]]
            log_probabilities = scores[:, : keep.vocabulary].float().log_softmax(-1)
            scored[index] += _scored(plain, log_probabilities, keep.likeliest or 0)

        return Callbacks(growing.piece, growing.token, growing.done, prompt, growing.end)

    requests = [
        (tuple(tokens), each, "", listener(index))
        for index, (tokens, each) in enumerate(zip(prompts, settings, strict=True))
    ]
    numbers = service.submit(requests, scored=keep.prompt)
    return PendingRequest(service, numbers, queue, scored, tokens=[[] for _ in prompts])


def _scored(tokens: Sequence[TokenScore], log_probabilities: Tensor, likeliest: int) -> list[TokenScore]:
    """The tokens with their log-probabilities, of [tokens, v]."""
    found = torch.topk(log_probabilities, min(likeliest, log_probabilities.shape[-1]))
    ids = torch.tensor([each.token for each in tokens], device=log_probabilities.device)
    own = log_probabilities.gather(-1, ids[:, None])[:, 0].tolist()
    rows = zip(tokens, own, found.indices.tolist(), found.values.tolist(), strict=True)
    return [
        replace(each, log_probability=value, likeliest={**dict(zip(near, values, strict=True)), each.token: value})
        for each, value, near, values in rows
    ]
