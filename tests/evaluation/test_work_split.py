"""Work is shared out among replicas, each item exactly once, and every replica gets all results in order."""

from megatron.distributed.mesh import Axis, Topology
from megatron.evaluation.work_split import split_over_replicas
from tests.multi_rank import run_distributed

ITEMS = ["a", "bbbb", "cc", "ddd", "e", "ffffff", ""]


def shared(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    done: list[str] = []

    def work(items: list[str]) -> list[str]:
        done.extend(items)
        return [item.upper() for item in items]

    axis = Topology.build(pipe=1, model=1, rank=rank, world_size=world_size).data
    return split_over_replicas(ITEMS, work, axis, len), done


def test_each_item_is_done_once_by_one_of_two_replicas():
    (first, one), (second, two) = run_distributed(shared, 2)
    assert first == second == [item.upper() for item in ITEMS]
    assert sorted(one + two) == sorted(ITEMS)
    assert abs(sum(map(len, one)) - sum(map(len, two))) <= 4


def test_one_replica_does_all_and_nothing_is_nothing():
    assert split_over_replicas(ITEMS, lambda items: [item * 2 for item in items], Axis("data"), len) == [
        x * 2 for x in ITEMS
    ]
    assert split_over_replicas([], lambda items: [], Axis("data"), len) == []
