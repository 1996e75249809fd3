#!/usr/bin/env python
"""Puts the low-rank updates of a checkpoint (`lora`) into its weights, which gives a checkpoint like any other.

    python tools/merge_lora.py --load-dir checkpoints/tuned --save-dir checkpoints/merged

Each targeted matrix W becomes W + (alpha / rank) B A. What is written holds weights and their configuration without
`lora`, and no state of the optimizer: generate, evaluate or export it, or train it on with `finetune: true`. Any layout
is read; the memory needed is about one layer. Flags may be spelt with dashes or underscores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.checkpoint.merge import merge
from megatron.errors import ConfigError, RunError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Merge low-rank updates into a checkpoint's weights.")
    made.add_argument("--load-dir", "--load_dir", type=Path, required=True, help="a save folder or one checkpoint")
    made.add_argument("--save-dir", "--save_dir", type=Path, required=True, help="the save folder to write")
    made.add_argument("--iteration", type=int, help="checkpoint to take (default: the latest)")
    made.add_argument(
        "--target-tensor-parallel-size", "--target_tensor_parallel_size", type=int, default=1, help="default: 1"
    )
    made.add_argument(
        "--target-pipeline-parallel-size",
        "--target_pipeline_parallel_size",
        type=int,
        default=0,
        help="0 keeps all layers in one file a rank, more keeps a file a layer (default: 0)",
    )
    made.add_argument(
        "--config-file", "--config_file", type=Path, nargs="+", default=[], help="YAML files that describe the model"
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    asked = parser().parse_args(arguments)
    sizes = {"model_size": asked.target_tensor_parallel_size, "pipe_size": asked.target_pipeline_parallel_size}
    try:
        made = merge(asked.load_dir, asked.save_dir, iteration=asked.iteration, config_files=asked.config_file, **sizes)
    except (ConfigError, RunError) as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    print(f"{made}: the model with its updates merged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
