"""OpenAI's `POST /v1/chat/completions`: an answer to messages, which the run's chat template renders.

What the model writes is given as it is: calls of tools and reasoning are not taken out of the text.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from megatron.inference.generation_request import GenerationResult
from megatron.serving.api_context import ApiContext, GenerationOptions, complete_answer, reason, usage
from megatron.serving.api_errors import failed_event
from megatron.serving.chat_request import Chat
from megatron.serving.completions import STREAM
from megatron.serving.logprobs import chat_logprobs
from megatron.serving.streaming import PendingRequest, TokenScore


def add_chat(app: FastAPI, desk: ApiContext) -> None:
    """POST /v1/chat/completions."""

    @app.post("/v1/chat/completions", response_model=None, responses=STREAM)
    async def chat(body: Chat, request: Request) -> Response | dict[str, Any]:
        desk.check(request, body.model)
        rendered = desk.conversations.text(
            body.turns(),
            tools=body.offered,
            opens=body.add_generation_prompt and not body.continue_final_message,
            goes_on=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
        options = GenerationOptions(
            body.sampling(desk.sampling),
            body.new,
            body.stops(desk.stops),
            body.seed,
            body.n or 1,
            likeliest=(body.top_logprobs or 0) if body.logprobs else None,
        )
        texts = desk.begin([desk.conversations.tokens(desk.tokenizer, rendered)], options)
        messages = Messages(desk, body, texts)
        if body.stream:
            return StreamingResponse(messages.stream(), media_type="text/event-stream")
        return await complete_answer(request, texts, messages.head("chat.completion"), messages.choice)


class Messages:
    """The answers to a request in OpenAI's form."""

    def __init__(self, desk: ApiContext, body: Chat, texts: PendingRequest) -> None:
        self._desk, self._body, self._texts = desk, body, texts
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def head(self, kind: str) -> dict[str, Any]:
        """What answers of a kind begin with."""
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._desk.model,
            "system_fingerprint": self._desk.fingerprint,
        }

    def choice(self, index: int, record: GenerationResult) -> dict[str, Any]:
        """One answer that is done."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": record.text or "", "refusal": None},
            "logprobs": self._logprobs(self._texts.tokens[index]),
            "finish_reason": reason(record),
        }

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events: the role of each answer, pieces of the answers, and why each ended."""
        for index in range(len(self._texts.numbers)):
            yield self._event([self._part(index, {"role": "assistant", "content": "", "refusal": None})])
        async for event in self._texts.events():
            if event.record is not None and event.record.failed:
                yield failed_event(event.record.message or "")
                return
            delta = {"content": event.piece} if event.piece or event.record is None else {}
            ended = None if event.record is None else reason(event.record)
            yield self._event([self._part(event.index, delta, event.tokens, ended)])
        if self._body.include_usage:
            yield self._event([], usage(self._texts))
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], used: dict[str, int] | None = None) -> str:
        extra = {"usage": used} if self._body.include_usage else {}
        return f"data: {json.dumps({**self.head('chat.completion.chunk'), 'choices': choices, **extra})}\n\n"

    def _part(
        self, index: int, delta: dict[str, Any], tokens: Sequence[TokenScore] = (), ended: str | None = None
    ) -> dict[str, Any]:
        scores = self._logprobs(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": scores, "finish_reason": ended}

    def _logprobs(self, tokens: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._desk.words, tokens, self._body.top_logprobs or 0)
