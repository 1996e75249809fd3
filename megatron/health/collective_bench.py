"""Benchmark of collectives on every parallel axis, in several sizes.

Bus bandwidth is the traffic of each rank's link, which is comparable across operations and group sizes; the factors are
those of NVIDIA's nccl-tests (doc/PERFORMANCE.md): 2 (n - 1) / n for all-reduce, (n - 1) / n for all-gather,
reduce-scatter and all-to-all, 1 for send and receive.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron.distributed.mesh import Axis, Topology
from megatron.distributed.process_group import device

SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 24)
WARMUP, ROUNDS = 2, 5


@dataclass(frozen=True)
class CollectiveTiming:
    """Time of one operation on one axis."""

    axis: str
    """The parallel axis."""
    ranks: int
    """Its size."""
    operation: str
    """The collective."""
    size: int
    """Size of the full tensor [bytes]."""
    seconds: float
    """Median over rounds, of the slowest rank."""

    @property
    def bus_bandwidth(self) -> float:
        """Traffic of each rank's link [bytes/s]."""
        n = self.ranks
        factor = {"all_reduce": 2 * (n - 1) / n, "send_recv": 1.0}.get(self.operation, (n - 1) / n)
        return factor * self.size / self.seconds


def time_collectives(topology: Topology, sizes: Sequence[int] = SIZES) -> Iterator[CollectiveTiming]:
    """Times every operation on every axis that has more than one rank, and on all ranks. Collective."""
    world = Axis("world", topology.world_size, topology.rank, tuple(range(topology.world_size)), dist.group.WORLD)
    axes = [topology.pipe, topology.data, topology.context, topology.model, world]
    for axis in axes:
        if axis.size == 1:
            continue
        for name, make in _OPERATIONS.items():
            for size in sizes:
                yield CollectiveTiming(axis.name, axis.size, name, size, _time_call(make(size, axis)))


def table(timings: Sequence[CollectiveTiming]) -> str:
    """Formats one line per timing."""
    lines = [f"{'axis':8} {'ranks':>5}  {'operation':14} {'bytes':>10} {'time [us]':>11} {'bus [GB/s]':>10}"]
    lines += [
        f"{each.axis:8} {each.ranks:5}  {each.operation:14} {each.size:10} {each.seconds * 1e6:11.1f} "
        f"{each.bus_bandwidth / 1e9:10.2f}"
        for each in timings
    ]
    return "\n".join(lines)


def _time_call(work: Callable[[], None]) -> float:
    """Returns the seconds of one call, the same on every rank."""
    seconds = []
    for round_ in range(WARMUP + ROUNDS):
        dist.barrier()
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if round_ >= WARMUP:
            seconds.append(time.perf_counter() - started)
    slowest = torch.tensor([statistics.median(seconds)], device=device())
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def _floats(size: int, parts: int) -> torch.Tensor:
    """Returns a tensor of about `size` bytes whose length divides by `parts`."""
    return torch.ones(max(1, size // 4 // parts) * parts, device=device())


def _all_reduce(size: int, axis: Axis) -> Callable[[], None]:
    values = _floats(size, 1)

    def work() -> None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=axis.group)

    return work


def _all_gather(size: int, axis: Axis) -> Callable[[], None]:
    values = _floats(size, axis.size)
    part = values.chunk(axis.size)[axis.rank].clone()

    def work() -> None:
        dist.all_gather_into_tensor(values, part, group=axis.group)

    return work


def _reduce_scatter(size: int, axis: Axis) -> Callable[[], None]:
    values = _floats(size, axis.size)
    part = values.chunk(axis.size)[axis.rank].clone()

    def work() -> None:
        dist.reduce_scatter_tensor(part, values, op=dist.ReduceOp.MAX, group=axis.group)

    return work


def _all_to_all(size: int, axis: Axis) -> Callable[[], None]:
    values = _floats(size, axis.size)
    received = torch.empty_like(values)

    def work() -> None:
        dist.all_to_all_single(received, values, group=axis.group)

    return work


def _send_recv(size: int, axis: Axis) -> Callable[[], None]:
    """Sends to the next rank of the axis and receives from the previous one."""
    values, received = _floats(size, 1), _floats(size, 1)
    to, source = axis.ranks[(axis.rank + 1) % axis.size], axis.ranks[axis.rank - 1]

    def work() -> None:
        pair = [dist.P2POp(dist.isend, values, to, axis.group), dist.P2POp(dist.irecv, received, source, axis.group)]
        for request in dist.batch_isend_irecv(pair):
            request.wait()

    return work


_OPERATIONS: dict[str, Callable[[int, Axis], Callable[[], None]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "send_recv": _send_recv,
}
