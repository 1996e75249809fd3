#!/usr/bin/env python
"""Measures perplexity per word of a text, and the accuracy of last-word prediction, on local files.

    ./deepy.py tools/perplexity.py CONF... --eval-text wiki.test.tokens --eval-cloze lambada_test.jsonl

Either file may be left out. `load` names the checkpoint; `eval_overlap` the tokens that each window scores.
"""

import sys

from megatron.config import Config
from megatron.launcher.worker import worker_main


def main(config: Config) -> None:
    """Measures as the configuration says."""
    from megatron.evaluation.runner import measure_perplexity

    measure_perplexity(config)


if __name__ == "__main__":
    sys.exit(worker_main(main, sys.argv[1:]))
