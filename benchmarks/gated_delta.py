"""The gated delta rule in chunks, forward and backward, beside the chunked fallback of transformers.

    python benchmarks/gated_delta.py                       # 2,048 tokens of Qwen3-Next's heads, 2 threads
    python benchmarks/gated_delta.py --heads 4,8 --widths 64,64

Both take the same inputs in fp32. Passes alternate, so that a machine that slows down slows both; it prints the median
times, and the median of the ratios of neighbouring passes. How far the two are apart is printed first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from megatron.kernels.gated_delta import DeltaInputs, gated_delta


def parse() -> argparse.Namespace:
    """Returns the settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the sequence [tokens]")
    parser.add_argument("--heads", default="16,32", help="key heads and value heads")
    parser.add_argument("--widths", default="128,128", help="widths of a key and of a value [features]")
    parser.add_argument("--pairs", type=int, default=7, help="passes of each")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def inputs(asked: argparse.Namespace) -> list[Tensor]:
    """Queries and keys of length 1, values, decays and strengths."""
    keys, values = map(int, asked.heads.split(","))
    key, value = map(int, asked.widths.split(","))
    torch.manual_seed(1)
    q, k = (F.normalize(torch.randn(1, asked.tokens, keys, key), dim=-1) for _ in range(2))
    decay = -F.softplus(torch.randn(1, asked.tokens, values))
    drawn = (q, k, torch.randn(1, asked.tokens, values, value), decay, torch.rand(1, asked.tokens, values))
    return [each.requires_grad_() for each in drawn]


def timed(run: Callable[[], Tensor], given: list[Tensor]) -> float:
    """Returns the seconds of a forward and a backward pass."""
    for each in given:
        each.grad = None
    begin = time.perf_counter()
    run().sum().backward()
    return time.perf_counter() - begin


def main() -> int:
    """Prints the difference, the times and their ratio."""
    asked = parse()
    torch.set_num_threads(asked.threads)
    given = inputs(asked)
    factor = given[0].shape[-1] ** -0.5

    def ours() -> Tensor:
        return gated_delta(DeltaInputs(given[0] * factor, *given[1:]))[0]

    def theirs() -> Tensor:
        return torch_chunk_gated_delta_rule(*given)[0]  # type: ignore[no-any-return]

    with torch.no_grad():
        print(f"largest difference {(ours() - theirs()).abs().max().item():.1e}")
    pairs = [(timed(ours, given), timed(theirs, given)) for _ in range(asked.pairs + 1)][1:]
    for name, at in (("ours", 0), ("transformers", 1)):
        print(f"{name:<14}{1000 * statistics.median(pair[at] for pair in pairs):>10.1f} ms")
    print(f"{'ratio':<14}{statistics.median(other / mine for mine, other in pairs):>10.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
