"""Continuous batching: requests come and go while one token loop runs.

Before every step the first rank takes in requests that have arrived and lets go of those whose clients have left, and
sends the other ranks of the model what it did (`SchedulerStep`), so that all of them run the same loop. A request that
arrives while others decode has its first token after the step in progress; greedy text of the others does not change.

What goes wrong with one text ends that text. An error of the model itself ends the texts that it was asked about; where
several ranks hold the model it ends the service, since their loops may no longer be alike.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from megatron.engine.drafter import DraftCounts
from megatron.engine.engine import Engine
from megatron.inference.generation_request import GenerationRequest, GenerationResult, Settings
from megatron.inference.token_loop import RunningSequence, Step, TokenLoop
from megatron.log import get_logger
from megatron.tokenizers.base import Tokenizer

IDLE_SECONDS = 5.0
"""How often the other ranks hear of the first one when there is nothing to do, so that no collective times out."""


@dataclass(frozen=True)
class QueuedRequest:
    """One text that is wanted."""

    number: int
    """Of the request in the service."""
    prompt: tuple[int, ...]
    """At least one token."""
    settings: Settings
    """Generation settings."""
    context: str = ""
    """Text of the prompt."""
    scored: bool = False
    """Whether the prompt's own scores are wanted, which costs a pass over it."""


@dataclass(frozen=True)
class Callbacks:
    """Whom an answer goes to; called from the decoding thread."""

    piece: Callable[[str], None]
    """A new piece of the text."""
    token: Callable[[int, Tensor], None]
    """A new token and its scores [v]."""
    done: Callable[[GenerationResult], None]
    """The outcome."""
    prompt: Callable[[Tensor], None] = lambda scores: None
    """The scores [tokens - 1, v] of the prompt's tokens but the first, before anything else, where they were asked for.
    """
    end: Callable[[int, Tensor], None] = lambda token, scores: None
    """The token that ends the answer, which is none of it, and its scores [v]."""


@dataclass(frozen=True)
class SchedulerStep:
    """What every rank does before the next step."""

    joining: tuple[QueuedRequest, ...] = ()
    """Requests that start."""
    leaving: tuple[int, ...] = ()
    """Numbers of sequences that are aborted."""
    stop: bool = False
    """True in the last step."""


class ModelWorker:
    """One rank's token loop, which follows orders.

    Args:
        engine: Computes logits.
        tokenizer: Tokenizer of the model.
        rows: Largest number of texts at a time.
        max_length: Largest number of tokens of a text.
        alone: True if this rank holds the full model.
        make: Makes the token loop.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        rows: int,
        max_length: int,
        alone: bool = True,
        make: Callable[..., TokenLoop] = TokenLoop,
    ) -> None:
        self._tokenizer = tokenizer
        self._loop = make(engine, rows=rows, max_length=max_length)
        self._answers: dict[int, GenerationRequest] = {}
        self._alone = alone
        self._failures = 0
        self.rows = rows

    @property
    def free(self) -> int:
        """How many texts may join."""
        return self._loop.free

    @property
    def running(self) -> int:
        """Texts that grow now."""
        return len(self._answers)

    def has(self, number: int) -> bool:
        """Whether a text is still in the loop."""
        return number in self._answers

    def generated(self, number: int) -> int:
        """Tokens that a text in the loop has grown by; 0 if it is not there."""
        return len(self._answers[number].new_tokens) if number in self._answers else 0

    def follow(
        self, orders: SchedulerStep, listeners: dict[int, Callbacks] | None = None
    ) -> list[tuple[int, GenerationResult]]:
        """Lets texts leave and join, and makes one token for every other text. Returns what has ended, by number.

        A text that something went wrong with is among them, and continues until it is removed.
        """
        for number in orders.leaving:
            answer = self._answers.pop(number, None)
            if answer is not None and answer.growing in self._loop.texts:
                self._loop.leave(answer.growing)
        done = self._model(self._loop.step, [text for text in self._loop.texts if not text.ended])
        callbacks = listeners or {}
        joining = [self._answer(ask, callbacks.get(ask.number)) for ask in orders.joining]
        for ask, answer in zip(orders.joining, joining, strict=True):
            if ask.scored and len(ask.prompt) > 1:
                done += self._score(ask, answer, callbacks.get(ask.number))
        starting = [answer.growing for answer in joining if not answer.growing.ended]
        done += self._model(lambda: self._loop.join(starting), starting) if starting else []
        return done + self._ended()

    def _answer(self, ask: QueuedRequest, callbacks: Callbacks | None) -> GenerationRequest:
        self._answers[ask.number] = answer = GenerationRequest(
            self._tokenizer,
            ask.settings,
            ask.prompt,
            ask.context,
            stream=callbacks.piece if callbacks else None,
            on_token=callbacks.token if callbacks else None,
            on_end=callbacks.end if callbacks else None,
        )
        return answer

    def _model(self, ask: Callable[[], list[Step]], texts: list[RunningSequence]) -> list[tuple[int, GenerationResult]]:
        """Asks the model about texts and hands their tokens on. Returns the texts that this failed for."""
        try:
            steps = ask()
        except Exception as error:
            if not self._alone:
                raise
            self._log_error(f"the model could not be asked about {len(texts)} texts", error)
            return [self._given_up(text, error) for text in texts]
        return [each for step in steps if (each := self._hand_on(step)) is not None]

    def _score(
        self, ask: QueuedRequest, answer: GenerationRequest, callbacks: Callbacks | None
    ) -> list[tuple[int, GenerationResult]]:
        """Hands the scores of a prompt's tokens on. Returns the text if this failed for it, as `follow` does."""
        try:
            scores = self._loop.scores_of(ask.prompt)
        except Exception as error:
            if not self._alone:
                raise
            self._log_error(f"the model could not be asked about the prompt of text {ask.number}", error)
            answer.give_up(f"the model failed ({type(error).__name__})")
            return []
        if not bool(scores.logsumexp(-1).isfinite().all()):
            answer.give_up("the model's scores of the prompt are not numbers (NaN or infinite)")
            self._log_error(f"text {ask.number} ends: the model's scores are not numbers (NaN or infinite)")
            return []
        try:
            if callbacks is not None:
                callbacks.prompt(scores)
        except Exception as error:  # noqa: BLE001  of a listener
            self._log_error(f"the scores of text {ask.number} could not be handed on", error)
            return [(ask.number, answer.failure(f"the text could not be handed on ({type(error).__name__})"))]
        return []

    def _given_up(self, text: RunningSequence, error: Exception) -> tuple[int, GenerationResult]:
        number, answer = next(item for item in self._answers.items() if item[1].growing is text)
        del self._answers[number]
        if text in self._loop.texts:
            self._loop.leave(text)
        return number, answer.failure(f"the model failed ({type(error).__name__})")

    def _hand_on(self, step: Step) -> tuple[int, GenerationResult] | None:
        number, answer = next(item for item in self._answers.items() if item[1].growing is step.text)
        try:
            if answer.take(step):
                step.text.end()
        except Exception as error:  # noqa: BLE001  of a listener, or of the text's own decoding
            self._log_error(f"text {number} could not be handed on", error)
            return number, answer.failure(f"the text could not be handed on ({type(error).__name__})")
        if step.text.failed:
            self._log_error(f"text {number} ends: the model's scores are not numbers (NaN or infinite)")
        return None

    def _ended(self) -> list[tuple[int, GenerationResult]]:
        done = [(number, answer) for number, answer in self._answers.items() if answer.growing.ended]
        for number, _ in done:
            del self._answers[number]
        return [(number, answer.record()) for number, answer in done]

    def _log_error(self, what: str, error: Exception | None = None) -> None:
        """Says the first of a kind with all that is known, and later ones in a line."""
        self._failures += 1
        trace = error if self._failures == 1 else None
        get_logger(__name__).warning("%s%s", what, f" ({error!r})" if error else "", exc_info=trace)


@dataclass
class ServiceCounts:
    """What the service has done since it started."""

    requests: int = 0
    """Requests that were accepted."""
    refused: int = 0
    """Requests that were refused."""
    abandoned: int = 0
    """Requests whose client disconnected."""
    tokens: int = 0
    """Generated tokens, those of abandoned requests too."""
    prompt_tokens: int = 0
    """Tokens of prompts."""


class QueueFull(Exception):
    """So many requests wait already that no more are taken."""


class ShuttingDown(Exception):
    """The service finishes what it has and takes no more."""


@dataclass
class Service:
    """The first rank's side: threads hand requests in with `submit`, one thread decodes with `run`.

    publish: hands the orders to the other ranks of the model.
    """

    worker: ModelWorker
    """Runs the token loop."""
    max_waiting: int
    """Texts that may wait for a free row."""
    publish: Callable[[SchedulerStep], None] = lambda orders: None
    """Sends a step to the other ranks."""
    counts: ServiceCounts = field(default_factory=ServiceCounts)
    """Counts since the start."""
    drafts: DraftCounts | None = None
    """Drafted tokens since the start, where there are modules for them."""

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self.started = time.time()
        self._waiting: deque[QueuedRequest] = deque()
        self._listeners: dict[int, Callbacks] = {}
        self._leaving: list[int] = []
        self._next = 0
        self._closing = False

    @property
    def waiting(self) -> int:
        """Requests that wait for a free row."""
        return len(self._waiting)

    @property
    def closing(self) -> bool:
        """Whether no more requests are taken."""
        return self._closing

    def submit(
        self, requests: list[tuple[tuple[int, ...], Settings, str, Callbacks]], *, scored: bool = False
    ) -> list[int]:
        """Queues texts, all or none, as (prompt, settings, context, listener); returns their numbers.

        Accepts as many as there are free rows and queue slots. More than the capacity are accepted when no request
        waits. scored: whether to score the prompts. Raises QueueFull or ShuttingDown.
        """
        with self._changed:
            if self._closing:
                raise ShuttingDown
            capacity = self.worker.rows + self.max_waiting
            beyond = len(requests) > capacity and not self._waiting
            if len(self._listeners) + len(requests) > capacity and not beyond:
                self.counts.refused += len(requests)
                raise QueueFull
            numbers = []
            for prompt, settings, context, listener in requests:
                self._listeners[self._next] = listener
                self._waiting.append(QueuedRequest(self._next, prompt, settings, context, scored))
                numbers.append(self._next)
                self._next += 1
                self.counts.requests += 1
                self.counts.prompt_tokens += len(prompt)
            self._changed.notify()
            return numbers

    def abandon(self, numbers: list[int]) -> None:
        """Abort sequences whose client disconnected; finished ones are ignored."""
        with self._changed:
            for number in numbers:
                if self._listeners.pop(number, None) is None:
                    continue
                self.counts.abandoned += 1
                before = len(self._waiting)
                self._waiting = deque(ask for ask in self._waiting if ask.number != number)
                if len(self._waiting) == before:
                    self._leaving.append(number)
            self._changed.notify()

    def close(self) -> None:
        """Takes no more requests; `run` returns when those it has are done."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def run(self, closing: Callable[[], bool] = lambda: False) -> None:
        """Decodes until `close` is called, or closing() says so, and all is done. Collective with `run_follower`."""
        while True:
            if closing() and not self._closing:
                self.close()
            orders = self._orders()
            self.publish(orders)
            if orders.stop:
                return
            self.counts.tokens += sum(map(self.worker.generated, orders.leaving))
            for number, record in self.worker.follow(orders, self._listeners):
                self._finish(number, record)

    def _finish(self, number: int, record: GenerationResult) -> None:
        """Hands an outcome to its listener; a failed sequence that still runs is removed."""
        with self._changed:
            listener = self._listeners.pop(number, None)
            if self.worker.has(number):
                self._leaving.append(number)  # its tokens are counted when it leaves
            else:
                self.counts.tokens += record.length
        try:
            if listener is not None:
                listener.done(record)
        except Exception as error:  # noqa: BLE001  whatever the listener does
            get_logger(__name__).warning("the outcome of text %d could not be handed on (%r)", number, error)

    def _orders(self) -> SchedulerStep:
        """What to do next; waits a while when there is nothing."""
        with self._changed:
            if not (self._waiting or self._leaving or self.worker.running):
                if self._closing:
                    return SchedulerStep(stop=True)
                self._changed.wait(min(IDLE_SECONDS, 0.5))
            leaving = tuple(self._leaving)
            self._leaving.clear()
            free = self.worker.free + sum(map(self.worker.has, leaving))
            joining = tuple(self._waiting.popleft() for _ in range(min(free, len(self._waiting))))
            return SchedulerStep(joining, leaving)


def run_follower(worker: ModelWorker, hear: Callable[[], SchedulerStep]) -> None:
    """Run the steps that rank 0 sends, on the other ranks of the model, until it stops."""
    while not (orders := hear()).stop:
        worker.follow(orders)
