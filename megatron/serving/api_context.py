"""What the endpoints of the text service share: who may ask, for which model, and how texts are begun."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastapi import Request, Response

from megatron.errors import RunError
from megatron.inference.generation_request import GenerationResult, Settings
from megatron.inference.prompt_encoding import read_prompt
from megatron.inference.sampling import Sampling
from megatron.serving.api_errors import Refused
from megatron.serving.chat_rendering import Conversations
from megatron.serving.scheduler import QueueFull, Service, ShuttingDown
from megatron.serving.streaming import Keep, PendingRequest, start
from megatron.serving.token_text import Words
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.vocab_limit import known_ids

APART = 0x5851F42D4C957F2D
"""Between the seeds of a request's texts, so that requests with seeds close by have none in common."""


@dataclass(frozen=True)
class GenerationOptions:
    """How the texts of a request are made."""

    sampling: Sampling
    """Sampling settings."""
    new: int | None
    """At most; where it is None the service's own limit, and no more than fit [tokens]."""
    stops: tuple[str, ...] = ()
    """Stop texts."""
    seed: int | None = None
    """Seed of the request, if any."""
    copies: int = 1
    """Of each prompt."""
    tokens: bool = False
    """Whether the answers' single tokens are wanted."""
    likeliest: int | None = None
    """With their log-probabilities, and those of so many others."""
    scored: bool = False
    """Whether those of the prompts' tokens are wanted as well."""
    ends: bool = False
    """Whether the tokens that end answers are wanted behind theirs."""


@dataclass(frozen=True)
class ApiContext:
    """What the endpoints share."""

    service: Service
    """The scheduler."""
    tokenizer: Tokenizer
    """The run's tokenizer."""
    model: str
    """Its name for clients."""
    seq_length: int
    """Of prompt and answer together [tokens]."""
    key: str | None
    """What requests must carry."""
    seed: int
    """Seed of the service."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end a text, besides the end of a document."""
    sampling: Sampling = field(default_factory=Sampling)
    """The model's settings, for requests that leave some out."""
    stops: tuple[str, ...] = ()
    """Texts that end an answer, for requests that name none."""
    maximum_tokens: int | None = None
    """Of an answer, for requests that name none [tokens]."""
    vocabulary: int | None = None
    """The ids that have a probability, the tokenizer's unless given [tokens]."""
    conversations: Conversations = field(default_factory=Conversations)
    """The chat template."""

    @cached_property
    def words(self) -> Words:
        """The texts of single tokens."""
        return Words(self.tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """Stands for the model and how it is served, so that clients see when it changes."""
        identity = repr((self.model, self.seq_length, self.seed, self.end_ids, self.service.started))
        return f"neox-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def check(self, request: Request, model: str | None = None) -> None:
        """Raises Refused unless the request carries the key, where one is set, and means the model that is here."""
        header = request.headers.get("authorization", "")
        scheme, _, rest = header.partition(" ")
        given = rest.strip() if scheme.lower() == "bearer" else header
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise Refused(401, "the key is missing or wrong: send `Authorization: Bearer KEY`")
        if model is not None and model != self.model:
            raise Refused(404, f"the model `{model}` does not exist; this is `{self.model}`", "model_not_found")

    def tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's tokens, at least one. Raises Refused for ids that do not exist."""
        if isinstance(prompt, str):
            try:
                return read_prompt(self.tokenizer, prompt)
            except RunError as error:
                raise Refused(400, f"prompt: {error.issues[0].message}") from None
        if max(prompt) >= known_ids(self.tokenizer):
            raise Refused(400, f"prompt: there are only {known_ids(self.tokenizer)} tokens")
        return list(prompt)

    def _most(self, prompt: Sequence[int]) -> int:
        """The longest answer to a prompt, where the request names none [tokens]."""
        room = self.seq_length - len(prompt)
        return room if self.maximum_tokens is None else min(room, self.maximum_tokens)

    def begin(self, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> PendingRequest:
        """Queues the texts of a request. Raises Refused for what does not fit, or while too many wait."""
        beyond = [token for token, _ in options.sampling.bias if token >= known_ids(self.tokenizer)]
        if beyond:
            raise Refused(400, f"logit_bias: there is no token {beyond[0]}, only {known_ids(self.tokenizer)} tokens")
        longest = max(len(each) for each in prompts)
        new = max(1, self.seq_length - longest) if options.new is None else options.new
        if longest + new > self.seq_length:
            raise Refused(
                400,
                f"the longest prompt has {longest} tokens and {new} more are wanted; the model's context is "
                f"{self.seq_length} tokens",
                "context_length_exceeded",
            )
        texts = [each for each in prompts for _ in range(options.copies)]
        chance = self.seed if options.sampling.greedy else time.time_ns() % 2**62
        first = chance if options.seed is None else options.seed
        settings = [
            Settings(
                options.sampling,
                first + at * APART,
                self._most(each) if options.new is None else new,
                self.seq_length,
                stop=options.stops,
                end_ids=self.end_ids,
            )
            for at, each in enumerate(texts)
        ]
        keep = Keep(
            self.vocabulary or known_ids(self.tokenizer),
            options.tokens,
            options.likeliest,
            options.scored,
            options.ends,
        )
        try:
            started = start(self.service, self.words, texts, settings, keep)
        except QueueFull:
            raise Refused(429, "too many requests are waiting; try again later") from None
        except ShuttingDown:
            raise Refused(503, "the service is shutting down") from None
        started.prompt_tokens = sum(len(each) for each in prompts)
        return started


def require_text(records: Sequence[GenerationResult]) -> None:
    """Raises Refused where the model failed on one of the texts."""
    failed = [record.message for record in records if record.failed]
    if failed:
        raise Refused(500, failed[0] or "the model failed")


def usage(texts: PendingRequest) -> dict[str, int]:
    """The tokens of a request that is done."""
    new = sum(record.length for record in texts.records.values())
    return {"prompt_tokens": texts.prompt_tokens, "completion_tokens": new, "total_tokens": texts.prompt_tokens + new}


async def complete_answer(
    request: Request,
    texts: PendingRequest,
    head: Mapping[str, Any],
    choice: Callable[[int, GenerationResult], dict[str, Any]],
) -> Response | dict[str, Any]:
    """Waits for all texts of a request and returns the body of its answer, in OpenAI's form.

    Raises Refused where the model failed on one of the texts.

    Args:
        request: The request; an answer to a client that disconnected is empty.
        texts: Its texts in progress.
        head: The fields in front.
        choice: Makes the entry of one text from its number and result.
    """
    records = await texts.all(request.is_disconnected)
    if records is None:
        return Response(status_code=400)
    require_text(records)
    choices = [choice(index, record) for index, record in enumerate(records)]
    return {**head, "choices": choices, "usage": usage(texts)}


def reason(record: GenerationResult) -> str:
    """Why a text ended, in OpenAI's words."""
    return "stop" if record.finished else "length"
