"""Command line of tools that write a checkpoint's weights in another layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def layout_parser(description: str) -> argparse.ArgumentParser:
    """Makes the parser: checkpoint to read, folder to write, layout there. Flags may have dashes or underscores."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--load-dir", "--load_dir", type=Path, required=True, help="a save folder or one checkpoint")
    result.add_argument("--save-dir", "--save_dir", type=Path, required=True, help="the save folder to write")
    result.add_argument("--iteration", type=int, help="checkpoint to take (default: the latest)")
    result.add_argument(
        "--target-tensor-parallel-size", "--target_tensor_parallel_size", type=int, default=1, help="default: 1"
    )
    result.add_argument(
        "--target-pipeline-parallel-size",
        "--target_pipeline_parallel_size",
        type=int,
        default=0,
        help="0 keeps all layers in one file a rank, more keeps a file a layer (default: 0)",
    )
    result.add_argument(
        "--config-file", "--config_file", type=Path, nargs="+", default=[], help="YAML files that describe the model"
    )
    return result


def layout_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments for `megatron.checkpoint` beside the two folders."""
    return {
        "iteration": args.iteration,
        "config_files": args.config_file,
        "model_size": args.target_tensor_parallel_size,
        "pipe_size": args.target_pipeline_parallel_size,
    }
