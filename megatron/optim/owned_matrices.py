"""Matrices of a model in bfloat16, whose fp32 copies are each owned by one rank (ZeRO 1 by whole matrices).

The owner of a matrix is one of the ranks that hold it: of the data-parallel ranks, and of their tensor-parallel ranks.
Owners are assigned by the cost of an update, rows x columns x min(rows, columns), the costliest matrix first, each to
the rank with the least so far. In a step, gradients are summed to the owner over data-parallel ranks, the shards of
tensor-parallel ranks are gathered there, and the new weights go the same way back in bfloat16.

The weights of a group are consecutive in one buffer, and so are their fp32 gradients, ordered by the
data-parallel rank of the owner: each of these ranks receives one range of the buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron.distributed.mesh import Axis, Topology
from megatron.distributed.param_attrs import copy_structure, expert_rank_and_size, is_sharded
from megatron.optim.unsharded import AssignedTensor, full_shape


@dataclass(frozen=True)
class Owner:
    """The rank that updates a matrix."""

    data: int
    """Its index among the data-parallel ranks that hold the matrix."""
    model: int
    """Its tensor-parallel rank."""


def data_axis(parameter: Parameter, topology: Topology) -> Axis:
    """Returns the data-parallel ranks that hold the same shard of a parameter; of experts not all of them do."""
    return topology.dp_cp if expert_rank_and_size(parameter)[1] == 1 else topology.expert_data


def assign_owners(parameters: Sequence[Parameter], topology: Topology) -> dict[Parameter, Owner]:
    """Assigns an owner to each matrix; the same on all ranks of a pipeline stage."""
    loads = [[0] * topology.model.size for _ in range(topology.dp_cp.size)]
    costs = {parameter: _cost(full_shape(parameter, topology.model.size)) for parameter in parameters}
    owners = {}
    for parameter in sorted(parameters, key=lambda one: -costs[one]):  # stable, so that all ranks agree
        span = topology.dp_cp.size // data_axis(parameter, topology).size  # expert-parallel ranks are neighbours
        slots = [
            (sum(loads[number][model] for number in range(start * span, (start + 1) * span)), start, model)
            for start in range(topology.dp_cp.size // span)
            for model in range(topology.model.size)
        ]
        _, data, model = min(slots)
        for number in range(data * span, (data + 1) * span):
            loads[number][model] += costs[parameter]
        owners[parameter] = Owner(data, model)
    return owners


def by_owner(parameters: Sequence[Parameter], owners: dict[Parameter, Owner]) -> list[Parameter]:
    """Returns parameters in the order of their owners' data-parallel ranks, as their buffer needs them."""
    return sorted(parameters, key=lambda one: owners[one].data)


@dataclass
class OwnedMatrices:
    """The matrices of one group, on one rank."""

    parameters: list[Parameter]
    """Shards of this rank in bfloat16, in the order of `by_owner`; views of `weights`."""
    owners: dict[Parameter, Owner]
    """Owner of each."""
    weights: Tensor
    """Their buffer, flat; it may have padding at its end."""
    gradients: Tensor
    """Buffer of their fp32 gradients, in the same order."""
    data: Axis
    """Ranks that hold the same shards."""
    model: Axis
    """Ranks that hold the other shards."""
    divisor: int
    """Number of data-parallel ranks whose gradients the mean is over."""
    assigned: dict[Parameter, AssignedTensor] = field(init=False)
    """Each matrix, with its fp32 copy on its owner."""

    def __post_init__(self) -> None:
        """Makes the fp32 copies of this rank's matrices; collective."""
        sizes = [parameter.numel() for parameter in self.parameters]
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        self._range = dict(zip(self.parameters, zip(starts, sizes, strict=True), strict=True))
        self.assigned = {
            parameter: AssignedTensor(
                parameter, self.owners[parameter].model, full_shape(parameter, self.model.size), None, across_data=True
            )
            for parameter in self.parameters
        }
        shards = {one: one.detach() for one in self.parameters if self.owners[one].data == self.data.rank}
        for parameter, full in self._gather(shards, self.weights.dtype).items():
            master = Parameter(full.float().clone().view(self.assigned[parameter].shape))
            copy_structure(parameter, master)
            old = self.assigned[parameter]
            self.assigned[parameter] = AssignedTensor(parameter, old.owner, old.shape, master, across_data=True)

    @property
    def masters(self) -> list[Parameter]:
        """The fp32 copies that this rank owns, in full."""
        return [one.full for one in self.assigned.values() if one.full is not None]

    def reduce_gradients(self) -> None:
        """Averages gradients to their owners, as `grad` of the fp32 copies. Collective; the buffer is used up."""
        self._wait(
            dist.reduce(part, dst=self.data.ranks[rank], group=self.data.group, async_op=True)
            for rank, part in self._ranges(self.gradients)
        )
        shards = {}
        for parameter in self.parameters:
            if self.owners[parameter].data == self.data.rank:
                start, size = self._range[parameter]
                shards[parameter] = self.gradients.narrow(0, start, size).div_(self.divisor).view(parameter.shape)
        for parameter, full in self._gather(shards, self.gradients.dtype).items():
            master = self.assigned[parameter].full
            assert master is not None
            master.grad = full.to(master.dtype).view(master.shape)

    def send_weights(self) -> None:
        """Rounds the fp32 copies to the type of the weights, and sends them to all ranks. Collective."""
        mine = [one for one in self.parameters if self.owners[one].data == self.data.rank]
        outgoing = {rank: [one for one in mine if self.owners[one].model == self.model.rank] for rank in self._peers}
        incoming = {rank: [one for one in mine if self.owners[one].model == rank] for rank in self._peers}
        rounded = {one: self._master(one).detach().to(one.dtype) for one in outgoing[self.model.rank]}
        parts = {
            rank: [self.assigned[one].shard_of(rounded[one], rank, self.model.size) for one in found]
            for rank, found in outgoing.items()
        }
        sizes = {rank: [one.numel() for one in found] for rank, found in incoming.items()}
        received = self._exchange(parts, sizes, self.weights.dtype)
        for rank, found in incoming.items():
            for parameter, values in zip(found, received[rank], strict=True):
                parameter.detach().copy_(values.view(parameter.shape))
        self._wait(
            dist.broadcast(part, src=self.data.ranks[rank], group=self.data.group, async_op=True)
            for rank, part in self._ranges(self.weights)
        )

    @property
    def _peers(self) -> range:
        return range(self.model.size)

    def _master(self, parameter: Parameter) -> Parameter:
        full = self.assigned[parameter].full
        assert full is not None, "only the owner of a matrix has its fp32 copy"
        return full

    def _ranges(self, buffer: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields each data-parallel rank that owns matrices, and its range of the buffer; none for a lone rank."""
        if self.data.size == 1:
            return
        start = 0
        for rank in range(self.data.size):
            size = sum(one.numel() for one in self.parameters if self.owners[one].data == rank)
            if size:
                yield rank, buffer.narrow(0, start, size)
            start += size

    def _gather(self, shards: dict[Parameter, Tensor], dtype: torch.dtype) -> dict[Parameter, Tensor]:
        """Gathers full tensors to their tensor-parallel owners: shards of this data rank -> those that it owns."""
        rank, held = self.model.rank, list(shards)
        sent = {
            peer: [one for one in held if self._travels(one, rank, self.owners[one].model, peer)]
            for peer in self._peers
        }
        own = [one for one in held if self.owners[one].model == rank]
        came = {peer: [one for one in own if self._travels(one, peer, rank, rank)] for peer in self._peers}
        received = self._exchange(
            {peer: [shards[one] for one in found] for peer, found in sent.items()},
            {peer: [one.numel() for one in found] for peer, found in came.items()},
            dtype,
        )
        parts: dict[Parameter, list[Tensor]] = {one: [] for one in own}
        for peer, found in came.items():
            for parameter, values in zip(found, received[peer], strict=True):
                parts[parameter].append(values.view(parameter.shape))
        return {one: self.assigned[one].assemble(found) for one, found in parts.items()}

    @staticmethod
    def _travels(parameter: Parameter, source: int, owner: int, target: int) -> bool:
        """Returns whether a shard goes from a tensor-parallel rank to another one; the owner has replicated ones."""
        return owner == target and (is_sharded(parameter) or source == owner)

    def _exchange(
        self, parts: dict[int, list[Tensor]], sizes: dict[int, list[int]], dtype: torch.dtype
    ) -> dict[int, tuple[Tensor, ...]]:
        """Exchanges tensors with the tensor-parallel ranks. Returns those of each rank, flat.

        Args:
            parts: Tensors for each rank.
            sizes: Numbers of elements of the tensors from each rank.
            dtype: Type of all of them.
        """
        if self.model.size == 1:
            return {0: tuple(one.reshape(-1) for one in parts[0])}
        sent = [sum(one.numel() for one in parts[rank]) for rank in self._peers]
        came = [sum(sizes[rank]) for rank in self._peers]
        flat = [one.reshape(-1) for rank in self._peers for one in parts[rank]]
        received = torch.empty(sum(came), dtype=dtype, device=self.weights.device)
        outgoing = torch.cat(flat) if flat else received.new_empty(0)
        dist.all_to_all_single(received, outgoing, came, sent, group=self.model.group)
        return {rank: part.split(sizes[rank]) for rank, part in zip(self._peers, received.split(came), strict=True)}

    @staticmethod
    def _wait(works: Iterator[dist.Work | None]) -> None:
        for work in list(works):
            if work is not None:
                work.wait()


def _cost(shape: torch.Size) -> int:
    return prod(shape) * min(shape)
