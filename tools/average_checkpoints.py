#!/usr/bin/env python
"""Writes the mean of the last checkpoints of a run (LAWA, arXiv:2209.14981), or the moving average of one.

    python tools/average_checkpoints.py --load-dir checkpoints/run --last 5 --save-dir checkpoints/mean
    python tools/average_checkpoints.py --load-dir checkpoints/run --ema --save-dir checkpoints/ema

The mean is taken in fp32, of the optimizer's fp32 copies where there are any. The result has weights and their
configuration, and no optimizer state: generate, evaluate or export it, or train it with `finetune: true`. Any layout is
read. Flags may be spelt with dashes or underscores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.checkpoint.offline.average import average, moving_average
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool
from tools.target_layout import layout_arguments, layout_parser


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = layout_parser("Average the weights of a run's last checkpoints.")
    which = result.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=int, help="number of checkpoints, the newest or those up to --iteration")
    which.add_argument("--ema", action="store_true", help="the moving average of a run with ema_decay")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        if args.ema:
            made, number = moving_average(args.load_dir, args.save_dir, **layout_arguments(args))
            print(f"{made}: the moving average at iteration {number}")
            return 0
        made, chosen = average(args.load_dir, args.save_dir, last=args.last, **layout_arguments(args))
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{made}: the mean of iterations {', '.join(map(str, chosen.iterations))}")
    if chosen.others:
        newest, others = chosen.iterations[-1], ", ".join(map(str, chosen.others))
        print(f"left out: {others}, from which iteration {newest} was not trained")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
