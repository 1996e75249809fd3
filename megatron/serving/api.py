"""The HTTP side of the text service: one application of all its endpoints.

OpenAI's completions, chat completions and models, Megatron-LM's `PUT /api`, a page, health and metrics.
"""

from __future__ import annotations

from fastapi import FastAPI

from megatron.serving.api_context import ApiContext
from megatron.serving.api_errors import ERRORS, MOST_BYTES, add_handlers
from megatron.serving.body_limit import BodyLimit
from megatron.serving.chat import add_chat
from megatron.serving.completions import add_completions
from megatron.serving.megatron_api import add_megatron
from megatron.serving.models import add_models
from megatron.serving.status_endpoints import add_observation


def build_app(desk: ApiContext) -> FastAPI:
    """The application. Interactive documentation is at /docs, the description at /openapi.json."""
    app = FastAPI(title="NeoX text generation", version="1", responses=ERRORS, redoc_url=None)
    app.add_middleware(BodyLimit, most=MOST_BYTES)
    add_handlers(app)
    for add in (add_completions, add_chat, add_models, add_megatron, add_observation):
        add(app, desk)
    return app
