"""Gathers stacks of experts that are distributed over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron.distributed.mesh import Axis
from megatron.distributed.param_attrs import expert_axis, expert_rank_and_size


def gather_experts(parameter: Parameter) -> Tensor:
    """Returns the tensor-parallel shard with the experts of all ranks; collective for a distributed stack."""
    return gather_stack(parameter.detach(), expert_axis(parameter))


def gather_stack(stack: Tensor, axis: Axis | None) -> Tensor:
    """Returns a stack of experts with those of all ranks of the axis; the stack itself without one."""
    if axis is None or axis.size == 1:
        return stack
    parts = [torch.empty_like(stack) for _ in range(axis.size)]
    dist.all_gather(parts, stack.contiguous(), group=axis.group)
    return torch.cat(parts)


def local_experts(parameter: Tensor, shard: Tensor) -> Tensor:
    """Returns this rank's experts of a tensor-parallel shard."""
    rank, size = expert_rank_and_size(parameter)
    return shard if size == 1 else shard.chunk(size)[rank]
