#!/usr/bin/env python
"""Builds the index maps of a run before it starts, on any machine that sees the data.

    python tools/build_index.py configs/125M.yml configs/local_setup.yml [--key value ...] [--world-size 256]

Takes the files and flags that train.py takes, and needs no accelerator: what follows from the number of ranks, such as
a train_batch_size that is not given, follows from --world-size. The maps are beside the data, where every run with the
same data, split, seed, sequence length, packing and number of samples finds them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.checkpoint.save.saver import Counters
from megatron.config import Config, Resources, resolve
from megatron.config.derived.batch_rampup import BatchRampup
from megatron.config.flags import read_flags
from megatron.config.validation.unknown_values import require
from megatron.data.dataset.builder import epoch_samples, index_requests
from megatron.data.dataset.index_cache import IndexRequest, read_index_map, write_index_map
from megatron.data.dataset.sources import read_splits
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool
from megatron.training.data_setup import num_samples


def requests_of(config: Config) -> list[IndexRequest]:
    """Returns the index maps of a run of this configuration."""
    training, seq_length = config.training, require(config.model.text_length)
    iterations = training.train_iters
    if training.train_epochs is not None:
        samples = epoch_samples(
            config.data,
            epochs=training.train_epochs,
            seq_length=seq_length,
            seed=training.seed,
            is_builder=True,
            barrier=lambda: None,
        )
        iterations = samples // require(training.train_batch_size)
    elif training.train_samples is not None:
        ramp = BatchRampup.of(require(training.train_batch_size), training.rampup_batch_size)
        iterations = ramp.steps(training.train_samples)
    if iterations is None:
        raise ConfigError.of(
            "the length of the run is not given",
            key="train_iters",
            hint="give train_iters, train_samples or train_epochs",
        )
    requested = num_samples(training, iterations, Counters(), same_valid=config.data.valid_same_samples)
    splits, warnings = read_splits(config.data, requested, train_epochs=training.train_epochs)
    for warning in warnings:
        print(warning, file=sys.stderr)
    return [one for split in splits for one in index_requests(config.data, split, seq_length, training.seed)]


def build(request: IndexRequest) -> str:
    """Builds and writes one map; returns a line about it. Raises RunError when it cannot be written."""
    if read_index_map(request) is not None:
        return f"{request.stem}: there already"
    started = time.monotonic()
    error = write_index_map(request)
    if error is not None:
        raise RunError.of(
            f"the index map cannot be written ({error.strerror})",
            location=request.stem,
            hint="run where the folder of the data can be written",
        )
    return f"{request.stem}: built in {time.monotonic() - started:.1f} s"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the index maps of a run.", allow_abbrev=False)
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks of the run")
    args, rest = parser.parse_known_args(arguments)
    try:
        flags = read_flags(rest)
        config = resolve(flags.rest, flags.values, Resources(args.world_size)).config
        for request in requests_of(config):
            print(build(request), flush=True)
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
