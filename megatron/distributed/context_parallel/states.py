"""Blocks that process a sequence in order: each context-parallel rank goes on from what the rank before it ends with.

Shards follow each other. The last positions that a shift or a convolution reads are exchanged by all ranks at once. The
state of a recurrence comes from the rank before when that has computed its shard; as this one computes, that one is
already in its next block, so a pass of n blocks over c ranks takes the time of n + c - 1 blocks. Gradients of both go
back the same way.

Shapes: b micro batch, s sequence of one rank, c context-parallel degree.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.mesh import Axis

POSITIONS, STATE = 1, 2
"""Tags of what is sent, where the backend has tags."""


class StatePassing:
    """Sends to the ranks beside this one, and receives from them. Its calls are collective over the axis.

    It has what is still being sent, so it lives until a later collective of these ranks has ended; a step of training
    ends with one.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._under_way: list[tuple[Tensor, dist.Work]] = []

    @property
    def active(self) -> bool:
        """Whether several ranks share a sequence."""
        return self.axis.size > 1

    def positions_before(self, x: Tensor, count: int) -> Tensor:
        """Returns the last positions of the shard before this one, [b, s, .] -> [b, count, .]; zeros if there is none.

        ValueError if a shard has fewer positions.
        """
        if x.shape[1] < count:
            raise ValueError(f"a block reads {count} positions of the shard before, which has {x.shape[1]}")
        found: Tensor = _PositionsBefore.apply(x[:, x.shape[1] - count :], self)
        return found

    def receive(self, anchor: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
        """Returns the state that the rank before ends with; zeros on the first rank.

        Args:
            anchor: tensor from which gradients flow into the block; the state has one if it has.
            *shape: of the state.
            dtype: type of the state.
        """
        if self.axis.is_first:
            return torch.zeros(shape, dtype=dtype, device=anchor.device)
        state: Tensor = _Receive.apply(anchor, self, shape, dtype)
        return state

    def send(self, y: Tensor, state: Tensor) -> Tensor:
        """Sends the state to the rank after this one. Returns y, through which the gradient of the state comes back."""
        if self.axis.is_last:
            return y
        out: Tensor = _Send.apply(y, state, self)
        return out

    def put(self, x: Tensor, step: int, tag: int) -> None:
        """Starts to send a tensor to the rank that many steps further along the axis."""
        x = x.contiguous()
        work = dist.isend(x, self.axis.ranks[self.axis.rank + step], group=self.axis.group, tag=tag)
        self._under_way = [each for each in self._under_way if not each[1].is_completed()]
        if work is not None:
            self._under_way.append((x, work))

    def take(self, like: Tensor, step: int, tag: int) -> Tensor:
        """Returns what comes from the rank that many steps further, of the shape and type of a tensor."""
        received = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(received, self.axis.ranks[self.axis.rank + step], group=self.axis.group, tag=tag)
        return received


class _PositionsBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, last: Tensor, passing: StatePassing) -> Tensor:
        ctx.passing = passing
        if not passing.axis.is_last:
            passing.put(last, 1, POSITIONS)
        found = torch.zeros_like(last) if passing.axis.is_first else passing.take(last, -1, POSITIONS)
        ctx.save_for_backward(found)  # so that a recomputation, which ends with the last saved tensor, comes here
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        passing: StatePassing = ctx.passing
        if not passing.axis.is_first:
            passing.put(grads[0], -1, POSITIONS)
        return torch.zeros_like(grads[0]) if passing.axis.is_last else passing.take(grads[0], 1, POSITIONS), None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, passing: StatePassing, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ctx.passing = passing
        return passing.take(torch.empty(shape, dtype=dtype, device=anchor.device), -1, STATE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        ctx.passing.put(grads[0], -1, STATE)
        return None, None, None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, state: Tensor, passing: StatePassing) -> Tensor:
        ctx.passing = passing
        passing.put(state, 1, STATE)
        ctx.save_for_backward(state)  # for its shape, and so that a recomputation comes here
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (state,) = ctx.saved_tensors
        return grads[0], ctx.passing.take(state, 1, STATE), None
