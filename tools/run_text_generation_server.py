#!/usr/bin/env python
"""Serves a trained model over HTTP.

    ./deepy.py tools/run_text_generation_server.py CONF... [--serve-port 5000] [--serve-key KEY]

OpenAI's completions, chat completions and models, Megatron-LM's `PUT /api`, a page to type prompts at `/`, `/health`
and `/metrics`.
"""

import sys

from megatron.config import Config
from megatron.launcher.worker import StopSignal, worker_main


def main(config: Config) -> None:
    """Serves as the configuration says, until asked to stop."""
    stop = StopSignal.install()
    from megatron.serving.server import serve

    serve(config, stop)


if __name__ == "__main__":
    sys.exit(worker_main(main, sys.argv[1:]))
