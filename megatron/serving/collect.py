"""From the decoding thread to a request's coroutine: pieces, tokens and outcomes of a request's texts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.inference.answer import Record, Settings
from megatron.serving.batching import Listener, Service


@dataclass(frozen=True)
class TokenScore:
    """One token: its log-probability [nats], and those of the likeliest tokens there."""

    token: int
    log_probability: float
    likeliest: dict[int, float]


@dataclass(frozen=True)
class Event:
    """What happened to text `index` of a request: a piece of it, or its outcome."""

    index: int
    piece: str = ""
    record: Record | None = None


@dataclass
class Texts:
    """The texts of one request in progress. scores: of each text's tokens, where asked for."""

    service: Service
    numbers: list[int]
    queue: asyncio.Queue[Event]
    scores: list[list[TokenScore]]
    records: dict[int, Record] = field(default_factory=dict)

    async def events(self) -> AsyncIterator[Event]:
        """Everything that happens until all texts are done; abandons them when the reader stops early."""
        try:
            while len(self.records) < len(self.numbers):
                event = await self.queue.get()
                if event.record is not None:
                    self.records[event.index] = event.record
                yield event
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Nobody reads on."""
        if len(self.records) < len(self.numbers):
            self.service.abandon(self.numbers)

    async def all(self, gone: Callable[[], object]) -> list[Record] | None:
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
    service: Service,
    prompts: Sequence[tuple[Sequence[int], str]],
    settings: Sequence[Settings],
    *,
    likeliest: int | None = None,
    vocab_size: int,
) -> Texts:
    """Hands a request's texts in. likeliest: keep scores, and those of so many other tokens. Raises Full or Closing."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event] = asyncio.Queue()
    scores: list[list[TokenScore]] = [[] for _ in prompts]

    def put(event: Event) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)

    def listener(index: int) -> Listener:
        def token(number: int, logits: Tensor) -> None:
            if likeliest is not None:
                scores[index].append(_score(number, logits[:vocab_size], likeliest))

        return Listener(
            piece=lambda piece: put(Event(index, piece=piece)),
            token=token,
            done=lambda record: put(Event(index, record=record)),
        )

    numbers = service.submit(
        [
            (tuple(tokens), each, context, listener(index))
            for index, ((tokens, context), each) in enumerate(zip(prompts, settings, strict=True))
        ]
    )
    return Texts(service, numbers, queue, scores)


def _score(token: int, logits: Tensor, likeliest: int) -> TokenScore:
    log_probabilities = logits.float().log_softmax(-1)
    found = torch.topk(log_probabilities, likeliest)
    pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return TokenScore(token, float(log_probabilities[token]), dict(pairs))
