"""Time of each kind of attention, forward and backward, beside full causal attention in the same run, on this device.

    python benchmarks/attention.py [--length 4096] [--block 32] [--rounds 5] [--processor-time]

One layer's core: 8 heads of 64, micro batch 1. Rounds alternate between the kinds; it prints medians and the share
of the causal half that each kind sees, which is what its arithmetic is reduced to.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.block_sparsity import layout_of, visible_share
from megatron.kernels.attention import any_attention
from megatron.kernels.attention_patterns import AttentionMask, BlockPattern, MaskPattern, Window

HEADS, SIZE = 8, 64
OPTIONS: dict[str, dict[str, Any]] = {
    "local": {"num_local_blocks": 16},
    "sparse_fixed": {"num_local_blocks": 16},
    "sparse_variable": {"local_window_blocks": [16]},
    "bigbird": {"num_sliding_window_blocks": 9, "num_random_blocks": 2},
    "bslongformer": {"num_sliding_window_blocks": 9},
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="positions [tokens]")
    parser.add_argument("--block", type=int, default=32, help="block of the sparse kinds [tokens]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="count the processor's time, one thread")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.process_time if args.processor_time else time.perf_counter
    if args.processor_time:
        torch.set_num_threads(1)
    window = 8 * args.block
    patterns: dict[str, tuple[MaskPattern | None, float]] = {
        "global": (None, 1.0),
        f"window {window}": (Window(window), visible_share("global", None, 0, window, args.length)),
    }
    for kind, options in OPTIONS.items():
        layout = layout_of(kind, {"block": args.block, **options}, 0)
        assert layout is not None
        patterns[kind] = (BlockPattern(layout, range(HEADS)), layout.visible_share(args.length))
    times: dict[str, list[float]] = {name: [] for name in patterns}
    for _ in range(args.rounds + 1):
        for name, (pattern, _) in patterns.items():
            times[name].append(seconds(pattern, args.length, device, clock))
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first round builds masks
    print(f"{'kind':<18}{'seen':>8}{'time [ms]':>12}{'of global':>12}")
    for name, (_, share) in patterns.items():
        print(f"{name:<18}{share:>8.3f}{1000 * medians[name]:>12.1f}{medians[name] / medians['global']:>12.3f}")


def seconds(pattern: MaskPattern | None, length: int, device: torch.device, clock: Callable[[], float]) -> float:
    """One forward and backward pass [s].

    Args:
        pattern: Mask besides the causal one.
        length: Length of the sequence [tokens].
        device: Device of the tensors.
        clock: Seconds.
    """
    q, k, v = (torch.randn(1, HEADS, length, SIZE, device=device, requires_grad=True) for _ in range(3))
    start = clock()
    view = None if pattern is None else AttentionMask(pattern)
    any_attention(device)(q, k, v, 0.0, None, view).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
