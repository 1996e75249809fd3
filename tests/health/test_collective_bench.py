"""Timed collectives: which axes are measured, and the arithmetic of bandwidth."""

from __future__ import annotations

import pytest

from megatron.distributed.mesh import Topology
from megatron.health.collective_bench import CollectiveTiming, table, time_collectives
from tests.multi_rank import run_distributed


def measuring_rank(rank: int, world_size: int) -> list[CollectiveTiming]:
    topology = Topology.build(pipe=2, model=1, rank=rank, world_size=world_size)
    return list(time_collectives(topology, sizes=(4096, 65536)))


def test_every_axis_with_several_ranks_is_measured_alike_on_all_of_them() -> None:
    results = run_distributed(measuring_rank, 4)
    first = results[0]
    assert all(result == first for result in results)
    assert {each.axis: each.ranks for each in first} == {"pipe": 2, "data": 2, "world": 4}
    names = {each.operation for each in first}
    assert names == {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"}
    assert len(first) == 3 * 5 * 2 and all(each.seconds > 0 for each in first)
    assert len(table(first).splitlines()) == 31


@pytest.mark.parametrize(("operation", "gigabytes"), [("all_reduce", 1.5), ("all_gather", 0.75), ("send_recv", 1.0)])
def test_bus_bandwidth(operation: str, gigabytes: float) -> None:
    """4 ranks, 1 GB, 1 s."""
    assert CollectiveTiming("data", 4, operation, 10**9, 1.0).bus_bandwidth == pytest.approx(gigabytes * 1e9)
