#!/usr/bin/env python
"""Merges the LoRA adapters of a checkpoint into its weights.

    python tools/merge_lora.py --load-dir checkpoints/tuned --save-dir checkpoints/merged

Each targeted matrix W becomes W + (alpha / rank) B A. The result has weights and their configuration without `lora`,
and no optimizer state: generate, evaluate or export it, or train it with `finetune: true`. Any layout is read; the
memory needed is about one layer. Flags may be spelt with dashes or underscores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.checkpoint.offline.merge_lora import merge
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool
from tools.target_layout import layout_arguments, layout_parser


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    return layout_parser("Merge LoRA adapters into a checkpoint's weights.")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        made = merge(args.load_dir, args.save_dir, **layout_arguments(args))
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{made}: the model with its adapters merged")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
