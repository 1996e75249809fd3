#!/usr/bin/env python
"""Makes the database that a model with retrieval reads: chunks, their embeddings, neighbours of the run's samples.

    ./deepy.py tools/build_retro_database.py CONF... --retro-embedder bert_folder

The configuration is that of the training run, with retro_add_retriever and retro_project_dir. A run that was stopped
goes on with the blocks that are missing.
"""

import sys

from megatron.config import Config
from megatron.launcher.worker import worker_main


def main(config: Config) -> None:
    """Builds as the configuration says."""
    from megatron.training.retro_setup import build_retro_database

    build_retro_database(config)


if __name__ == "__main__":
    sys.exit(worker_main(main, sys.argv[1:]))
