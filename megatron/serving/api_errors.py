"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}.

400 for what cannot be done, 401 without the key, 404 for a model that is not here, 413 for a body that is too large,
429 when too many requests wait, 500 when the model fails on the request, 503 while the service shuts down.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from megatron.log import get_logger

MOST_BYTES = 1 << 20
"""Largest body of a request."""

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot be done; the message says why."},
    401: {"description": "The key is missing or wrong."},
    404: {"description": "There is no such model here."},
    413: {"description": f"The body is larger than {MOST_BYTES} bytes."},
    500: {"description": "The model failed on this request, as where its scores are not numbers."},
    429: {"description": "Too many requests wait; come again after the time in Retry-After."},
    503: {"description": "The service is shutting down."},
    "4XX": {"description": "Another error in the request; the message says which."},
}

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
_HEADERS = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}
_MOST_SHOWN = 5  # errors in one message


class Refused(Exception):
    """A request that gets an error: its status, message, and OpenAI's code for it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def error(status: int, message: str, code: str | None = None, field: str | None = None) -> dict[str, Any]:
    """The body of an error. What is no text in the message becomes U+FFFD.

    Args:
        status: HTTP status.
        message: What is wrong.
        code: OpenAI's code for it.
        field: The parameter of the request that is wrong.
    """
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    text, param = _readable(message), None if field is None else _readable(field)
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def _readable(text: str) -> str:
    return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)


def failed_event(message: str) -> str:
    """The error of a text whose stream has begun."""
    return f"data: {json.dumps(error(500, message))}\n\n"


def add_handlers(app: FastAPI) -> None:
    """Every error of the application is JSON."""

    @app.exception_handler(Refused)
    async def refused(_request: Request, found: Refused) -> JSONResponse:
        return _error(found.status, str(found), found.code, _HEADERS.get(found.status))

    @app.exception_handler(HTTPException)
    async def unknown(_request: Request, found: HTTPException) -> JSONResponse:
        return _error(found.status_code, str(found.detail), None, dict(found.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, found: RequestValidationError) -> JSONResponse:
        if "json" not in (kind := request.headers.get("content-type", "none")):
            return _error(400, f"send the body as JSON, with the header Content-Type: application/json (it is {kind})")
        text = dict.fromkeys(_described(each["loc"][1:], each["msg"]) for each in found.errors())
        named = [each["loc"][1] for each in found.errors() if len(each["loc"]) > 1]
        field = named[0] if named and isinstance(named[0], str) else None  # a number is a position in the text
        return _error(400, "; ".join(list(text)[:_MOST_SHOWN]), field=field)

    @app.exception_handler(Exception)
    async def broken(_request: Request, found: Exception) -> JSONResponse:
        get_logger(__name__).error("a request could not be answered (%r)", found)
        return _error(500, f"the request could not be answered ({type(found).__name__})")


def _described(field: Sequence[int | str], message: str) -> str:
    """What is wrong with a field; of the body as a whole without a name, and without the library's words."""
    return ": ".join(filter(None, [".".join(map(str, field)), message.removeprefix("Value error, ")]))


def _error(
    status: int,
    message: str,
    code: str | None = None,
    headers: dict[str, str] | None = None,
    field: str | None = None,
) -> JSONResponse:
    return JSONResponse(error(status, message, code, field), status_code=status, headers=headers)
