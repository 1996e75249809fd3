#!/usr/bin/env python
"""Embeds a corpus of passages with the encoder of passages of a trained model.

    ./deepy.py tools/embed_passages.py CONF... --evidence-data-path psgs_w100.tsv --embedding-path embeddings

The corpus is a tsv of id, text and title. `load` names the checkpoint of a run of train_impl: ict or dpr. A run
that was stopped goes on with the passages that are missing.
"""

import sys

from megatron.config import Config
from megatron.launcher.worker import worker_main


def main(config: Config) -> None:
    """Embeds as the configuration says."""
    from megatron.retrieval.runner import embed_passages

    embed_passages(config)


if __name__ == "__main__":
    sys.exit(worker_main(main, sys.argv[1:]))
