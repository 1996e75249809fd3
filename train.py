"""Trains a model: ./deepy.py train.py CONF..., or under torchrun or srun, train.py CONF... itself."""

import sys

from megatron.config import Config
from megatron.launcher.worker import StopSignal, worker_main, wrote_base_shapes


def main(config: Config) -> None:
    """Trains until the end or a stop signal; or writes base shapes or runs the coordinate check, if configured."""
    if wrote_base_shapes(config):
        return
    if config.mup.coord_check:
        from megatron.training.mup.coord_check import coord_check

        coord_check(config)
        return
    stop = StopSignal.install()
    from megatron.training.trainer import train

    train(config, stop)


if __name__ == "__main__":
    sys.exit(worker_main(main, sys.argv[1:]))
