"""The service as people and monitors see it: a page to type prompts on, `/health` and `/metrics`."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

from megatron.serving.api_context import ApiContext
from megatron.serving.scheduler import Service


def add_observation(app: FastAPI, desk: ApiContext) -> None:
    """GET /, /health and /metrics."""
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
        desk.check(request)
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
    if service.drafts is not None:
        drafts = service.drafts
        rows += [
            ("neox_drafted_tokens_total", "counter", "Tokens that the modules drafted.", drafts.proposed),
            ("neox_chosen_drafts_total", "counter", "Drafted tokens that the model chose too.", drafts.accepted),
        ]
    return "".join(
        f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n{name} {value}\n" for name, kind, help_text, value in rows
    )
