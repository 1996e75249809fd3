"""Collectives on plain Python values, over all ranks or over one group; without a process group, a world of one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

Item = TypeVar("Item")


def device() -> torch.device:
    """The device of this process: its CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def any_rank(holds: bool, group: dist.ProcessGroup | None = None) -> bool:
    """True on all ranks if `holds` is true on any rank. Collective over the ranks of the group, all without one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return holds
    flag = torch.tensor([float(holds)], device=device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


def all_gather_list(value: Item, group: dist.ProcessGroup | None = None) -> list[Item]:
    """The value of every rank, in order of ranks. Collective over the ranks of the group, all without one."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def all_gather_items(items: Sequence[Item]) -> list[Item]:
    """The items of all ranks in one list, in order of ranks. Collective over all ranks."""
    return list(chain.from_iterable(all_gather_list(list(items))))


def barrier() -> None:
    """Returns when every rank has called it. Collective over all ranks."""
    if dist.is_initialized():
        dist.barrier()


def announced_anywhere(name: str, holds: bool) -> bool:
    """Whether it holds here, or was announced by any rank before. Not collective: ranks may hear of it at other times.

    name: of what is announced, once and for good in a process group.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return holds
    store = distributed_c10d._get_default_store()
    if holds:
        store.set(f"neox/{name}", "1")
    return holds or bool(store.check([f"neox/{name}"]))
