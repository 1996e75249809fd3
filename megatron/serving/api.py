"""The HTTP side of the text service: Megatron-LM's `PUT /api`, OpenAI's `/v1/completions`, a page, health and metrics.

Errors are JSON as OpenAI's clients expect it, {"error": {"message", "type"}}: 400 for what cannot be done, 401 without
the key, 413 for a body that is too large, 429 when too many requests wait, 500 when the model fails on the request, 503
while the service shuts down.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from megatron.inference.answer import Record, Settings
from megatron.inference.reading import read_prompt
from megatron.inference.sampling import Sampling
from megatron.serving.batching import Closing, Full, Service
from megatron.serving.collect import Texts, TokenScore, start
from megatron.serving.limits import BodyLimit
from megatron.serving.requests import Completion, MegatronRequest
from megatron.tokenizers.base import Tokenizer

MOST_BYTES = 1 << 20
"""Largest body of a request."""

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot be done; the message says why."},
    401: {"description": "The key is missing or wrong."},
    413: {"description": f"The body is larger than {MOST_BYTES} bytes."},
    500: {"description": "The model failed on this request, as where its scores are not numbers."},
    429: {"description": "Too many requests wait; come again after the time in Retry-After."},
    503: {"description": "The service is shutting down."},
    "4XX": {"description": "Another mistake in the request; the message says which."},
}

STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The completion; with `stream` as server-sent events, the last of which is [DONE].",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


class Refused(Exception):
    """A request that gets an error: its status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Desk:
    """What the endpoints share.

    model: its name for clients. seq_length [tokens]: of prompt and answer together. key: what requests must carry.
    end_ids: tokens that end a text, besides the end of a document.
    """

    service: Service
    tokenizer: Tokenizer
    model: str
    seq_length: int
    key: str | None
    seed: int
    end_ids: tuple[int, ...] = ()

    def check_key(self, request: Request) -> None:
        """Raises Refused unless the request carries the key, where one is set."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise Refused(401, "the key is missing or wrong: send `Authorization: Bearer KEY`")

    def tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's tokens, at least one. Raises Refused for ids that do not exist."""
        if isinstance(prompt, str):
            return read_prompt(self.tokenizer, prompt)
        if max(prompt) >= self.tokenizer.vocab_size:
            raise Refused(400, f"prompt: there are only {self.tokenizer.vocab_size} tokens")
        return list(prompt)

    def begin(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Sampling,
        *,
        new: int | None,
        stops: tuple[str, ...],
        seed: int | None,
        copies: int = 1,
        likeliest: int | None = None,
    ) -> tuple[Texts, list[int]]:
        """Queues the texts of a request, `copies` of each prompt; also returns the prompts' lengths [tokens]."""
        encoded = [self.tokens(prompt) for prompt in prompts]
        longest = max(len(each) for each in encoded)
        new = self.seq_length - longest if new is None else new
        if new < 1 or longest + new > self.seq_length:
            raise Refused(
                400,
                f"the longest prompt has {longest} tokens and {new} more are wanted; the model's context is "
                f"{self.seq_length} tokens",
            )
        first = time.time_ns() % 2**62 if seed is None and not sampling.greedy else (seed or self.seed)
        texts = [(each, "") for each in encoded for _ in range(copies)]
        settings = [
            Settings(sampling, first + at, new, self.seq_length, stop=stops, end_ids=self.end_ids)
            for at, _ in enumerate(texts)
        ]
        try:
            started = start(self.service, texts, settings, likeliest=likeliest, vocab_size=self.tokenizer.vocab_size)
        except Full:
            raise Refused(429, "too many requests are waiting; try again later") from None
        except Closing:
            raise Refused(503, "the service is shutting down") from None
        return started, [len(each) for each in encoded]


def build_app(desk: Desk) -> FastAPI:
    """The application. Interactive documentation stands at /docs, the description at /openapi.json."""
    app = FastAPI(title="NeoX text generation", version="1", responses=ERRORS, redoc_url=None)
    app.add_middleware(BodyLimit, most=MOST_BYTES)

    @app.exception_handler(Refused)
    async def refused(_request: Request, fault: Refused) -> JSONResponse:
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(fault.status)
        return _error(fault.status, str(fault), headers)

    @app.exception_handler(HTTPException)
    async def unknown(_request: Request, fault: HTTPException) -> JSONResponse:
        return _error(fault.status_code, str(fault.detail), dict(fault.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, fault: RequestValidationError) -> JSONResponse:
        told = [".".join(str(part) for part in each["loc"][1:]) + ": " + each["msg"] for each in fault.errors()]
        return _error(400, "; ".join(told[:5]))

    _add_completions(app, desk)
    _add_megatron(app, desk)
    _add_observation(app, desk)
    return app


def _add_completions(app: FastAPI, desk: Desk) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        desk.check_key(request)
        return {"object": "list", "data": [{"id": desk.model, "object": "model", "created": 0, "owned_by": "neox"}]}

    @app.post("/v1/completions", response_model=None, responses=STREAM)
    async def completions(body: Completion, request: Request) -> Response | dict[str, Any]:
        desk.check_key(request)
        texts, lengths = desk.begin(
            body.prompts(),
            body.sampling(),
            new=body.max_tokens,
            stops=body.stops(),
            seed=body.seed,
            copies=body.n or 1,
            likeliest=body.logprobs,
        )
        head = {
            "id": f"cmpl-{texts.numbers[0]}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": desk.model,
        }
        if body.stream:
            usage = bool((body.stream_options or {}).get("include_usage"))
            return StreamingResponse(_stream(desk, texts, head, sum(lengths), usage), media_type="text/event-stream")
        records = await texts.all(request.is_disconnected)
        if records is None:
            return Response(status_code=400)  # nobody reads it
        _require_text(records)
        choices = [
            _choice(desk, index, record, texts.scores[index] if body.logprobs is not None else None)
            for index, record in enumerate(records)
        ]
        return {**head, "choices": choices, "usage": _usage(sum(lengths), records)}


async def _stream(
    desk: Desk, texts: Texts, head: dict[str, Any], prompt_tokens: int, usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: a piece of one text each, then the reason that it ended."""
    async for event in texts.events():
        if event.record is not None and event.record.failed:
            yield f"data: {json.dumps(_fault(500, event.record.message or ''))}\n\n"
            return
        if event.record is None:
            choice = {"index": event.index, "text": event.piece, "logprobs": None, "finish_reason": None}
        else:
            choice = {**_choice(desk, event.index, event.record, None), "text": ""}
        yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
    if usage:
        counted = _usage(prompt_tokens, list(texts.records.values()))
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': counted})}\n\n"
    yield "data: [DONE]\n\n"


def _require_text(records: Sequence[Record]) -> None:
    """Raises Refused where the model failed on one of the texts."""
    failed = [record.message for record in records if record.failed]
    if failed:
        raise Refused(500, failed[0] or "the model failed")


def _choice(desk: Desk, index: int, record: Record, scores: Sequence[TokenScore] | None) -> dict[str, Any]:
    return {
        "index": index,
        "text": record.text or "",
        "logprobs": None if scores is None else _logprobs(desk, scores),
        "finish_reason": "stop" if record.finished else "length",
    }


def _logprobs(desk: Desk, scores: Sequence[TokenScore]) -> dict[str, Any]:
    """OpenAI's form of them; offsets are those of the tokens' own texts put together."""
    tokens = [desk.tokenizer.decode([score.token]) for score in scores]
    offsets = [sum(len(token) for token in tokens[:at]) for at in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [score.log_probability for score in scores],
        "top_logprobs": [
            {desk.tokenizer.decode([token]): value for token, value in score.likeliest.items()} for score in scores
        ],
        "text_offset": offsets,
    }


def _usage(prompt_tokens: int, records: Sequence[Record]) -> dict[str, int]:
    new = sum(record.length for record in records)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": new, "total_tokens": prompt_tokens + new}


def _add_megatron(app: FastAPI, desk: Desk) -> None:
    @app.put("/api", response_model=None)
    async def api(body: MegatronRequest, request: Request) -> Response | dict[str, Any]:
        desk.check_key(request)
        texts, _ = desk.begin(
            body.prompts,
            body.sampling(),
            new=body.tokens_to_generate,
            stops=body.stops(),
            seed=body.random_seed,
            likeliest=0 if body.logprobs else None,
        )
        records = await texts.all(request.is_disconnected)
        if records is None:
            return Response(status_code=400)
        _require_text(records)
        answer: dict[str, Any] = {
            "text": [prompt + (record.text or "") for prompt, record in zip(body.prompts, records, strict=True)],
            "segments": [
                [desk.tokenizer.decode([token]) for token in desk.tokens(prompt + (record.text or ""))]
                for prompt, record in zip(body.prompts, records, strict=True)
            ],
        }
        if body.logprobs:
            answer["logprobs"] = [[score.log_probability for score in scores] for scores in texts.scores]
        return answer


def _add_observation(app: FastAPI, desk: Desk) -> None:
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    policy = "default-src 'self' 'unsafe-inline'; img-src 'self' data:"

    @app.get("/", include_in_schema=False)
    async def home() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> JSONResponse:
        closing = desk.service.closing
        return JSONResponse({"status": "closing" if closing else "ok"}, status_code=503 if closing else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> PlainTextResponse:
        desk.check_key(request)
        return PlainTextResponse(exposition(desk.service), media_type="text/plain; version=0.0.4")


def exposition(service: Service) -> str:
    """The counts in Prometheus' text format."""
    counts = service.counts
    rows = [
        ("neox_requests_total", "counter", "Texts asked for.", counts.requests),
        ("neox_requests_refused_total", "counter", "Texts refused because too many waited.", counts.refused),
        ("neox_requests_abandoned_total", "counter", "Texts whose client left.", counts.abandoned),
        ("neox_prompt_tokens_total", "counter", "Tokens of prompts.", counts.prompt_tokens),
        ("neox_generated_tokens_total", "counter", "Tokens generated.", counts.tokens),
        ("neox_requests_running", "gauge", "Texts that grow now.", service.worker.running),
        ("neox_requests_waiting", "gauge", "Texts that wait.", service.waiting),
    ]
    return "".join(f"# HELP {name} {told}\n# TYPE {name} {kind}\n{name} {value}\n" for name, kind, told, value in rows)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(_fault(status, message), status_code=status, headers=headers)


def _fault(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
