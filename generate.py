"""Generates text with a trained model: ./deepy.py generate.py CONF... [-i prompts.txt] [-o out.jsonl]."""

import sys

from megatron.config import Config
from megatron.launcher.worker import worker_main


def main(config: Config) -> None:
    """Generates as the configuration says."""
    from megatron.inference.runner import generate

    if config.model.retro_add_retriever:
        from megatron.retrieval.retriever import with_retrieval

        generate(config, with_retrieval)
    else:
        generate(config)


if __name__ == "__main__":
    sys.exit(worker_main(main, sys.argv[1:]))
