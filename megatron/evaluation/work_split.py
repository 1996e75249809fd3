"""Replicas of a model share work out: each item is done exactly once, and every replica gets every result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron.distributed.mesh import Axis
from megatron.distributed.process_group import all_gather_list

Item = TypeVar("Item")
Result = TypeVar("Result")


def split_over_replicas(
    items: Sequence[Item], work: Callable[[list[Item]], Sequence[Result]], axis: Axis, size: Callable[[Item], int]
) -> list[Result]:
    """The results of all items, in order. Collective over the axis.

    Args:
        items: All items; equal on all ranks.
        work: Gives the results of some items, in order.
        axis: The replicas.
        size: Of an item; large and small ones are assigned in turn, so that all replicas have about as much to do.
    """
    order = sorted(range(len(items)), key=lambda number: -size(items[number]))
    mine = order[axis.rank :: axis.size]
    found = dict(zip(mine, work([items[number] for number in mine]), strict=True))
    if axis.size > 1:
        found = {number: result for part in all_gather_list(found, axis.group) for number, result in part.items()}
    return [found[number] for number in range(len(items))]
