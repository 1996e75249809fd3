#!/usr/bin/env python
r"""Finds passages that answer questions, and measures how often one of the first has an answer.

    ./deepy.py tools/search_passages.py CONF... --evidence-data-path psgs_w100.tsv --embedding-path embeddings \
        --qa-data nq-test.tsv --retrieval-report-topk-accuracies 1 5 20 100

`embedding_path` is what tools/embed_passages.py wrote with the same model. A file of questions is a tsv of a question
and a list of answers, or JSON lines with question and answer.
"""

import sys

from megatron.config import Config
from megatron.launcher.worker import worker_main


def main(config: Config) -> None:
    """Searches as the configuration says."""
    from megatron.retrieval.runner import search_passages

    search_passages(config)


if __name__ == "__main__":
    sys.exit(worker_main(main, sys.argv[1:]))
