"""Collectives on plain Python values, over all ranks or one group; without a process group, a world of one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron.distributed.host_copy import HostCopy

Item = TypeVar("Item")


def device() -> torch.device:
    """Returns the device of this process: its CUDA device if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def any_rank(value: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Returns true on all ranks if `value` is true on any. Collective over the group, or over all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    flag = torch.tensor([float(value)], device=device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


class LaterAnyRank:
    """`any_rank` over all ranks whose answer is that to the call before, so that the host does not wait for the device.

    Every call starts one exchange and returns the result of the last one: false at first.
    """

    def __init__(self) -> None:
        self._asked: HostCopy | None = None

    def __call__(self, value: bool) -> bool:
        """Returns true on all ranks if `value` of the call before was true on any. Collective over all ranks."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return value
        flag = torch.full((1,), float(value), device=device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        before, self._asked = self._asked, HostCopy(flag)
        return before is not None and bool(before.read()[0])


def all_gather_list(value: Item, group: dist.ProcessGroup | None = None) -> list[Item]:
    """Returns the value of every rank, in rank order. Collective over the group, or over all ranks."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def all_gather_items(items: Sequence[Item]) -> list[Item]:
    """Returns the items of all ranks in one list, in rank order. Collective over all ranks."""
    return list(chain.from_iterable(all_gather_list(list(items))))


def barrier() -> None:
    """Returns when every rank has called it. Collective over all ranks."""
    if dist.is_initialized():
        dist.barrier()


def is_announced(name: str, value: bool) -> bool:
    """Returns whether `value` is true here or was announced by any rank before, through the store.

    Not collective: ranks may see it at different times. name: key of the announcement, which holds for the life of the
    process group.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    store = distributed_c10d._get_default_store()
    if value:
        store.set(f"neox/{name}", "1")
    return value or bool(store.check([f"neox/{name}"]))
