"""Our training step through DeepSpeed beside a plain loop over transformers' GPT-NeoX, in one process.

    python benchmarks/train_step.py [--pairs 15]

Steps alternate (ours, theirs, ours, ...), so that a machine whose speed drifts slows both; the figure is the median of
the ratios of neighbouring steps. What is compared is in contenders.py.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contenders import Shape, Step, ours, transformers_loop
from megatron.distributed.init import shutdown


def seconds(step: Step) -> float:
    """Wall time of one step."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def compare(shape: Shape, precision: str, pairs: int) -> tuple[float, float, float]:
    """Median ratio (theirs / ours: above 1 we are faster) and the median seconds of each."""
    mine, other = ours(shape, precision), transformers_loop(shape, precision)
    for step in (mine, other):
        for _ in range(3):
            step()
    times = [(seconds(mine), seconds(other)) for _ in range(pairs)]
    ratio = statistics.median(b / a for a, b in times)
    return ratio, statistics.median(a for a, _ in times), statistics.median(b for _, b in times)


def main() -> None:
    """Prints a line for each precision and vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps that are timed")
    pairs = parser.parse_args().pairs
    print(f"4 layers x 256, 8 heads, sequence 512, micro batch 4, {torch.get_num_threads()} threads, {pairs} pairs")
    for precision, vocabulary in itertools.product(("fp32", "bfloat16"), (512, 50304)):
        shape = Shape(layers=4, hidden=256, heads=8, sequence=512, micro_batch=4, vocabulary=vocabulary)
        ratio, mine, other = compare(shape, precision, pairs)
        print(
            f"{precision:9s} vocabulary {vocabulary:6d}: {ratio:5.2f}x the tokens/s of transformers "
            f"({shape.tokens / mine:,.0f} against {shape.tokens / other:,.0f} tokens/s)",
            flush=True,
        )
    shutdown()


if __name__ == "__main__":
    main()
