#!/usr/bin/env python
"""Reshards the weight files of a checkpoint, for programs that read only one layout.

    python tools/reshape_checkpoint.py --load-dir A --save-dir B --target-tensor-parallel-size 2 \
        --target-pipeline-parallel-size 2

Runs need no such step: `load` reads every layout. The optimizer's state is stored by name and range, which any layout
reads, so its files are copied. Flags may be spelt with dashes or underscores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.checkpoint.offline.reshard import reshape
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool
from tools.target_layout import layout_arguments, layout_parser


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    return layout_parser("Write a checkpoint's weights in another layout.")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parser().parse_args(arguments)
    target = layout_arguments(args)
    try:
        made = reshape(args.load_dir, args.save_dir, **target)
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{made}: weights for tensor parallel {target['model_size']}, pipeline parallel {target['pipe_size']}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
