#!/usr/bin/env python
"""Benchmarks collectives on each parallel axis: all-reduce, all-gather, reduce-scatter, all-to-all, send and receive.

    ./deepy.py tools/bench_collectives.py CONF...

The layout is the configuration's. A size or an axis that is much slower than on other machines indicates a problem of a
link, a switch or the choice of a network interface.
"""

import sys

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.launcher.worker import worker_main


def main(config: Config) -> None:
    """Measures and prints the table on rank 0."""
    from megatron.distributed.init import init_distributed, shutdown
    from megatron.health.collective_bench import table, time_collectives

    if config.parallelism.world_size == 1:
        raise ConfigError.of("one rank has no collectives", key="num_gpus", value=1, hint="start more ranks")
    topology = init_distributed(
        pipe_parallel_size=config.parallelism.pipe_parallel_size,
        model_parallel_size=config.parallelism.model_parallel_size,
        context_parallel_size=config.parallelism.context_parallel_size,
        seed=config.training.seed,
        backend=config.launch.distributed_backend,
        timeout_seconds=config.launch.collective_timeout,
    )
    try:
        measured = list(time_collectives(topology))
        if topology.rank == 0:
            print(table(measured))
    finally:
        shutdown()


if __name__ == "__main__":
    sys.exit(worker_main(main, sys.argv[1:]))
