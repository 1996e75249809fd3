"""The dashboard page: one static file with its data, or a server that the page polls every two seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files

from megatron.dashboard.runs import Run, snapshot
from megatron.errors import ConfigError

DATA_MARK = "/*DATA*/null"  # replaced by data in the template


def static_page(runs: Sequence[Run]) -> str:
    """Returns the page with the current data; it needs no server and no network."""
    data = json.dumps(snapshot(runs)).replace("<", "\\u003c")  # a name must not end the script
    return _template().replace(DATA_MARK, data)


def server(runs: Sequence[Run], host: str, port: int) -> ThreadingHTTPServer:
    """Creates a server of the page; port 0 takes any free one. Raises ConfigError when the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                self._answer("text/html; charset=utf-8", _template())
            elif self.path == "/data.json":
                self._answer("application/json", json.dumps(snapshot(runs)))
            else:
                self.send_error(404)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 (the base class calls it so)
            """Suppresses the log line per request."""

        def _answer(self, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise ConfigError.of(
            f"the page cannot be served there: {error.strerror}",
            key="--port",
            value=port,
            hint="name another, or 0 for any free one",
        ) from error


@cache
def _template() -> str:
    return files("megatron.dashboard").joinpath("page.html").read_text(encoding="utf-8")
