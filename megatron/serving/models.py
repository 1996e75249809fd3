"""OpenAI's `/v1/models`: the one model that is served."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request

from megatron.serving.api_context import ApiContext


def add_models(app: FastAPI, desk: ApiContext) -> None:
    """GET /v1/models and GET /v1/models/{name}."""
    model = {"id": desk.model, "object": "model", "created": int(desk.service.started), "owned_by": "neox"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        desk.check(request)
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one(name: str, request: Request) -> dict[str, Any]:
        desk.check(request, name)
        return model
