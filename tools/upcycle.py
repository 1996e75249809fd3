#!/usr/bin/env python
"""Makes a model with experts of a dense checkpoint, which computes the same until it is trained (arXiv:2212.05055).

    python tools/upcycle.py --load-dir checkpoints/dense --save-dir checkpoints/experts moe_num_experts=8 moe_top_k=2

Keys of experts follow as KEY=VALUE. `moe_router_type: topk` and `moe_normalize_top_k: true` are set unless given.
Every expert is a copy of its block's MLP; routers are drawn with `init_method_std`, shared experts give 0 at first. The
result has weights and their configuration, and no optimizer state: train it with `finetune: true`. Any layout is read;
the memory needed is about one layer. Flags may be spelt with dashes or underscores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.checkpoint.offline.upcycle import upcycle
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool
from tools.target_layout import layout_arguments, layout_parser


def key_and_value(text: str) -> tuple[str, Any]:
    """Returns the key and the value of KEY=VALUE, the value as YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key.replace("-", "_"), yaml.safe_load(value)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = layout_parser("Make a model with experts of a dense checkpoint.")
    result.add_argument("keys", nargs="+", type=key_and_value, metavar="KEY=VALUE", help="keys of experts")
    result.add_argument("--seed", type=int, default=1234, help="seed of the routers")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        made = upcycle(args.load_dir, args.save_dir, dict(args.keys), seed=args.seed, **layout_arguments(args))
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{made}: the model with experts")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
