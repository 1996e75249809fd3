"""OpenAI's `POST /v1/completions`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from megatron.inference.generation_request import GenerationResult
from megatron.serving.api_context import ApiContext, GenerationOptions, complete_answer, reason, usage
from megatron.serving.api_errors import Refused, failed_event
from megatron.serving.completion_request import Completion
from megatron.serving.logprobs import completion_logprobs
from megatron.serving.streaming import PendingRequest, TokenScore
from megatron.tokenizers.source import reads_sources

STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The completion; with `stream` as server-sent events, the last of which is [DONE].",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


def add_completions(app: FastAPI, desk: ApiContext) -> None:
    """POST /v1/completions."""

    @app.post("/v1/completions", response_model=None, responses=STREAM)
    async def completions(body: Completion, request: Request) -> Response | dict[str, Any]:
        desk.check(request, body.model)
        prompts = body.prompts()
        encoded = [desk.tokens(prompt) for prompt in prompts]
        scored = bool(body.echo) and body.logprobs is not None
        if scored and reads_sources(desk.tokenizer):
            raise Refused(400, "echo with logprobs: an encoder-decoder has no scores of the text that it reads")
        options = GenerationOptions(
            body.sampling(desk.sampling),
            body.new(desk.maximum_tokens),
            body.stops(() if scored else desk.stops),
            body.seed,
            body.n or 1,
            likeliest=body.logprobs,
            scored=scored,
            ends=body.logprobs is not None,
        )
        texts = desk.begin(encoded, options)
        echoes = None
        if body.echo:
            spelt = [each if isinstance(each, str) else desk.words.spelt(each) for each in prompts]
            echoes = [Echo(text, desk.words.offsets_in(text, ids)) for text, ids in zip(spelt, encoded, strict=True)]
        answers = Answers(desk, body, texts, echoes)
        if body.stream:
            return StreamingResponse(answers.stream(), media_type="text/event-stream")
        return await complete_answer(request, texts, answers.head, answers.choice)


@dataclass(frozen=True)
class Echo:
    """A prompt that is wanted back: its text, and where its tokens begin in it."""

    text: str
    """Text of the prompt."""
    offsets: list[int]
    """Offset of each token in the text [characters]."""


class Answers:
    """The texts of a request in OpenAI's form.

    Args:
        desk: State of the service.
        body: The request.
        texts: Sequences in progress.
        echoes: The prompts, where the request asks for them.
    """

    def __init__(
        self, desk: ApiContext, body: Completion, texts: PendingRequest, echoes: Sequence[Echo] | None
    ) -> None:
        self._desk, self._body, self._texts, self._echoes = desk, body, texts, echoes
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": desk.model,
            "system_fingerprint": desk.fingerprint,
        }

    def choice(self, index: int, record: GenerationResult) -> dict[str, Any]:
        """One text that is done."""
        echo = self._echo(index)
        tokens = [*self._prompt(index), *self._moved(index, self._texts.tokens[index])]
        return self._choice(index, (echo.text if echo else "") + (record.text or ""), tokens, reason(record))

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events: the prompt where it is wanted back, pieces of the texts, then why each ended."""
        begun = set()
        async for event in self._texts.events():
            if event.record is not None and event.record.failed:
                yield failed_event(event.record.message or "")
                return
            if event.index not in begun:
                begun.add(event.index)
                if echo := self._echo(event.index):
                    yield self._event([self._choice(event.index, echo.text, self._prompt(event.index), None)])
            ended = None if event.record is None else reason(event.record)
            tokens = self._moved(event.index, event.tokens)
            yield self._event([self._choice(event.index, event.piece, tokens, ended)])
        if self._body.include_usage:
            yield self._event([], usage(self._texts))
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], used: dict[str, int] | None = None) -> str:
        extra = {"usage": used} if self._body.include_usage else {}
        return f"data: {json.dumps({**self.head, 'choices': choices, **extra})}\n\n"

    def _choice(self, index: int, text: str, tokens: Sequence[TokenScore], ended: str | None) -> dict[str, Any]:
        has_logprobs = self._body.logprobs is not None
        scores = completion_logprobs(self._desk.words, tokens) if has_logprobs else None
        return {"index": index, "text": text, "logprobs": scores, "finish_reason": ended}

    def _echo(self, index: int) -> Echo | None:
        return self._echoes[index // (self._body.n or 1)] if self._echoes is not None else None

    def _prompt(self, index: int) -> list[TokenScore]:
        """The prompt's tokens, where they are wanted."""
        echo = self._echo(index)
        if echo is None or self._body.logprobs is None:
            return []
        pairs = zip(self._texts.prompts[index], echo.offsets, strict=True)
        return [replace(token, offset=offset) for token, offset in pairs]

    def _moved(self, index: int, tokens: Sequence[TokenScore]) -> list[TokenScore]:
        """An answer's tokens, which begin behind the prompt where that is wanted back."""
        echo = self._echo(index)
        by = len(echo.text) if echo else 0
        return [replace(token, offset=token.offset + by) for token in tokens]
