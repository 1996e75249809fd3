"""A text service in this process: the small model behind HTTP on a free port."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from megatron.serving.api import build_app
from megatron.serving.api_context import ApiContext
from megatron.serving.scheduler import ModelWorker, Service
from megatron.serving.server import _listen
from megatron.tokenizers.char_level import CharLevelTokenizer
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config


class Spelling(CharLevelTokenizer):
    """Every token is a letter, so that texts are readable and each token shows."""

    def decode(self, ids):
        return "".join(chr(ord("a") + token % 26) for token in ids)


@dataclass
class Running:
    """address: HOST:PORT."""

    address: str
    service: Service
    app: object

    @property
    def url(self) -> str:
        return f"http://{self.address}"


@contextmanager
def running(
    *,
    rows: int = 4,
    max_waiting: int = 64,
    key: str | None = None,
    engine=None,
    tokenizer=None,
    length: int = SEQUENCE,
    **more,
) -> Iterator[Running]:
    """more: of the desk."""
    engine = engine or SmallEngine(small_config())
    tokenizer = tokenizer or Spelling()
    service = Service(ModelWorker(engine, tokenizer, rows=rows, max_length=length), max_waiting)
    app = build_app(ApiContext(service, tokenizer, "small", length, key, 1, **more))
    listening = _listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=3))
    threads = [
        threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True),
        threading.Thread(target=service.run, daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield Running(f"127.0.0.1:{listening.getsockname()[1]}", service, app)
    finally:
        service.close()
        threads[1].join(30)
        server.should_exit = True
        threads[0].join(30)
        listening.close()
        assert not any(thread.is_alive() for thread in threads)
