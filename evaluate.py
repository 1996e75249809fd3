"""Evaluates a trained model on lm-eval tasks: ./deepy.py evaluate.py CONF... --eval_tasks TASK..."""

import sys

from megatron.config import Config
from megatron.launcher.worker import worker_main


def main(config: Config) -> None:
    """Evaluates as the configuration says."""
    from megatron.evaluation.runner import evaluate

    evaluate(config)


if __name__ == "__main__":
    sys.exit(worker_main(main, sys.argv[1:]))
