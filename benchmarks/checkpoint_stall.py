#!/usr/bin/env python
"""How long a save holds up the training loop, synchronous and in the background, on this machine.

    python benchmarks/checkpoint_stall.py [--megabytes 240] [--seconds 2] [--pairs 20] [--threads 1]

An iteration is a loop of matrix products on --threads threads that takes --seconds; with as many threads as cores
the writer has no core of its own, as in a run on a CPU. The state is real tensors of --megabytes.
Pairs alternate: an iteration alone, then iterations from the start of a background save until it is complete, fsync and
digests included. What the save costs beyond copying the state to the host's memory is the time of the latter less as
many times the former, the copy taken out; the median of the pairs is reported as a share of one iteration.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from megatron.checkpoint.format import layout
from megatron.checkpoint.save.async_writer import BackgroundWriter
from megatron.checkpoint.save.commit import make_room, publish
from megatron.checkpoint.save.snapshot import Snapshot

TENSORS = 12


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Measure what a save costs the training loop.")
    made.add_argument("--megabytes", type=int, default=240, help="size of the state [10^6 bytes]")
    made.add_argument("--seconds", type=float, default=2.0, help="length of an iteration")
    made.add_argument("--pairs", type=int, default=20)
    made.add_argument("--threads", type=int, default=1, help="threads of the iteration; 1 leaves the writer a core")
    made.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    return made


def iteration(products: int, matrix: torch.Tensor) -> float:
    """Computes; returns how long it took [s]."""
    started = time.perf_counter()
    for _ in range(products):
        torch.mm(matrix, matrix)
    return time.perf_counter() - started


def main() -> int:
    """The exit code."""
    asked = parser().parse_args()
    torch.set_num_threads(asked.threads)
    matrix = torch.randn(512, 512)
    iteration(20, matrix)
    products = int(100 * asked.seconds / iteration(100, matrix)) + 1
    state = [torch.randn(asked.megabytes * 250_000 // TENSORS) for _ in range(TENSORS)]
    extra, copies, alone, writes, synchronous, counts = [], [], [], [], [], []
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        for pair in range(asked.pairs):
            plain = iteration(products, matrix)
            writer, partial, final = BackgroundWriter(0, 1, 600), *_folders(Path(folder), 2 * pair)
            make_room(partial)
            started = time.perf_counter()
            held = _snapshot(state).held()
            copied = time.perf_counter() - started
            writer.start(partial, held, lambda written, a=partial, b=final: publish(a, b, written))
            count = 0
            while count == 0 or writer.busy:
                iteration(products, matrix)
                count += 1
            elapsed = time.perf_counter() - started
            writer.wait()
            counts.append(count)
            writes.append(time.perf_counter() - started - copied)
            started = time.perf_counter()
            partial, final = _folders(Path(folder), 2 * pair + 1)
            make_room(partial)
            publish(partial, final, list(_snapshot(state).write(partial)))
            synchronous.append(time.perf_counter() - started)
            alone.append(plain)
            copies.append(copied)
            extra.append((elapsed - copied - count * plain) / plain)
    middle = statistics.median
    print(f"state {asked.megabytes} MB, {asked.pairs} pairs, {asked.threads} threads, medians")
    print(f"iteration alone          {middle(alone):8.3f} s")
    print(f"copy to the host         {middle(copies):8.3f} s")
    print(f"background save, to end  {middle(writes):8.3f} s, within {middle(counts):g} iterations")
    print(f"synchronous save         {middle(synchronous):8.3f} s")
    print(f"cost beyond the copy     {100 * middle(extra):8.2f} % of an iteration")
    return 0


def _folders(folder: Path, number: int) -> tuple[Path, Path]:
    return layout.partial_directory(folder, number), layout.step_directory(folder, number)


def _snapshot(state: list[torch.Tensor]) -> Snapshot:
    return Snapshot({f"part_{number}.pt": tensor.clone for number, tensor in enumerate(state)})


if __name__ == "__main__":
    sys.exit(main())
