#!/usr/bin/env python
"""Measures bits per byte of a trained model on a text, and those of gzip -9 and xz -9e.

    ./deepy.py tools/bits_per_byte.py CONF... --eval-text valid.txt

The text is a plain file, or a .jsonl file with a document a line under "text". `load` names the checkpoint.
"""

import sys

from megatron.config import Config
from megatron.launcher.worker import worker_main


def main(config: Config) -> None:
    """Measures as the configuration says."""
    from megatron.evaluation.runner import measure_text

    measure_text(config)


if __name__ == "__main__":
    sys.exit(worker_main(main, sys.argv[1:]))
