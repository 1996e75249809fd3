"""Our training step through DeepSpeed beside those that a user would pick in its place.

    python benchmarks/train_step.py [--pairs 15] [--peers best|all] [--sequence 2048 --micro-batch 1] [--profile]

Each has a process of its own, as its user starts it: ours with the allocator's settings that our launcher gives its
workers, the others with those of their system. Steps alternate (ours, theirs, ours, ...), so that a machine whose speed
drifts slows both; the figure is the median of the ratios of neighbouring steps. Ours is contenders.py, the peers are
peers.py; "all" has each of these as it is and compiled, in bfloat16 also under autocast, and takes minutes to compile;
"best" times some steps of each of them, and compares with the fastest alone.
A share of the floor is the time that the matrix products of the linear layers take alone, as torch multiplies here,
over the time of our step.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contenders import Shape, Step, ours
from benchmarks.peers import MODELS, peer, product_floor
from benchmarks.step_process import StepProcess, step_process
from megatron.distributed.init import shutdown
from megatron.launcher.commands.local import KEEP_FREED_MEMORY

USUAL = "transformers sdpa"
STEPS = 8
"""Steps of a peer, of which the fastest counts where the best of all is looked for."""


def compare(mine: StepProcess, other: StepProcess, pairs: int) -> tuple[float, float, float]:
    """Median ratio (theirs / ours: above 1 we are faster) and the median seconds of each."""
    for step in (mine, other):
        for _ in range(3):
            step()
    times = [(mine(), other()) for _ in range(pairs)]
    ratio = statistics.median(b / a for a, b in times)
    return ratio, statistics.median(a for a, _ in times), statistics.median(b for _, b in times)


def peers(shape: Shape, precision: str, which: str) -> dict[str, Callable[[], Step]]:
    """Names, and what builds the step of each. which: a value of --peers."""
    if which == "usual":
        return {USUAL: partial(peer, USUAL, shape, precision, compiled=False)}
    found = {}
    for name, compiled, autocast in itertools.product(MODELS, (False, True), (False, True)):
        if not autocast or precision == "bfloat16":
            ways = ["compiled"] * compiled + ["autocast"] * autocast
            build = partial(peer, name, shape, precision, compiled=compiled, autocast=autocast)
            found[", ".join([name, *ways])] = build
    return fastest(found) if which == "best" else found


def fastest(found: dict[str, Callable[[], Step]]) -> dict[str, Callable[[], Step]]:
    """Returns the peer with the fastest step, of some that are timed one after the other."""
    times = {}
    for name, build in found.items():
        with step_process(build, {}) as step:
            try:
                times[name] = min(step() for _ in range(STEPS))
            except EOFError:  # its process has ended: what torch generates for it may not compile everywhere
                print(f"  {name}: cannot run here", flush=True)
                continue
        print(f"  {name}: {times[name]:.3f} s", flush=True)
    best = min(times, key=lambda name: times[name])
    return {best: found[best]}


def profile(step: Step) -> str:
    """Where the time of a step goes, by operator."""
    step()
    with torch.profiler.profile() as found:
        step()
    table: str = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)
    return table


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    result.add_argument("--pairs", type=int, default=15, help="pairs of steps that are timed")
    result.add_argument("--peers", choices=("usual", "best", "all"), default="usual", help=f"usual: {USUAL}")
    result.add_argument("--precision", nargs="+", choices=("fp32", "bfloat16"), default=["fp32", "bfloat16"])
    result.add_argument("--vocabulary", type=int, nargs="+", default=[512, 50304], help="numbers of ids")
    result.add_argument("--sequence", type=int, default=512, help="length of a sample [tokens]")
    result.add_argument("--micro-batch", type=int, default=4, help="samples of a step")
    result.add_argument("--profile", action="store_true", help="print where the time of our step goes, and end")
    return result


def main() -> None:
    """Prints a line for each precision, vocabulary and peer."""
    args = parser().parse_args()
    print(
        f"4 layers x 256, 8 heads, sequence {args.sequence}, micro batch {args.micro_batch}, "
        f"{torch.get_num_threads()} threads, {args.pairs} pairs"
    )
    for precision, vocabulary in itertools.product(args.precision, args.vocabulary):
        shape = Shape(4, 256, 8, args.sequence, args.micro_batch, vocabulary)
        if args.profile:
            print(f"{precision}, vocabulary {vocabulary}\n{profile(ours(shape, precision))}")
        else:
            measure(shape, precision, args.pairs, peers(shape, precision, args.peers))
    if args.profile:
        shutdown()


def measure(shape: Shape, precision: str, pairs: int, others: dict[str, Callable[[], Step]]) -> None:
    """Prints the ratio to each peer, the memory of both, and the share of the floor.

    Args:
        shape: Sizes.
        precision: "fp32" or "bfloat16".
        pairs: Steps of each that are timed.
        others: Name -> what builds the step of a peer.
    """
    ratios: dict[str, float] = {}
    own: list[float] = []
    with step_process(partial(ours, shape, precision), KEEP_FREED_MEMORY) as mine:
        for name, build in others.items():
            with step_process(build, {}) as other:
                try:
                    ratios[name], mine_seconds, their_seconds = compare(mine, other, pairs)
                except EOFError:
                    print(f"{name} cannot run here", flush=True)
                    continue
            own.append(mine_seconds)
            print(
                f"{precision:9s} vocabulary {shape.vocabulary:6d}: {ratios[name]:5.2f}x the tokens/s of {name} "
                f"({shape.tokens / mine_seconds:,.0f} against {shape.tokens / their_seconds:,.0f} tokens/s, "
                f"peak {mine.peak >> 20:,} against {other.peak >> 20:,} MiB)",
                flush=True,
            )
    share = product_floor(shape, precision) / statistics.median(own)
    best = min(ratios, key=lambda name: ratios[name])
    print(f"{'':9s} the best of them is {best} ({ratios[best]:.2f}x); products are {share:.0%} of our step", flush=True)


if __name__ == "__main__":
    main()
