"""Trains a model: ./deepy.py train.py CONF..., or under torchrun or srun, train.py CONF... itself."""

import sys

from megatron.config import Config
from megatron.launch.worker import StopSignal, run_door


def main(config: Config) -> None:
    """Trains as the configuration says, until the end or a stop signal."""
    stop = StopSignal.install()  # first, so that a signal which comes while torch is imported is not lost
    from megatron.training.run import train

    train(config, stop)


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))
