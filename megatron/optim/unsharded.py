"""Optimizers that need the full tensor, under tensor parallelism.

Muon orthogonalizes a matrix; SM3 and Adafactor keep one number a row and one a column. On a shard they would compute
something else. So each sharded tensor has an owner among the tensor-parallel ranks: gradients are gathered to it, it
holds the full tensor, updates it and scatters the shards. Owners are assigned by size, so memory and work are balanced
as evenly as full tensors allow. Replicated tensors are updated on every rank alike.

The inner optimizers are those of the libraries, unchanged. `state` is theirs, by the tensor that they update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron.distributed.mesh import Axis
from megatron.distributed.param_attrs import (
    copy_structure,
    expert_rank_and_size,
    is_sharded,
    shard_dim,
    shard_sections,
)
from megatron.optim.builder_args import Groups
from megatron.optim.qk_clip import QKClip
from megatron.param_table import section_slices

OptimizerFactory = Callable[[Groups], torch.optim.Optimizer]


@dataclass(frozen=True)
class AssignedTensor:
    """A sharded tensor and its owner."""

    shard: Parameter
    """Shard of this rank."""
    owner: int
    """Tensor-parallel rank that updates the tensor."""
    shape: torch.Size
    """Shape of the full tensor."""
    full: Parameter | None
    """Full tensor, on the owner only."""
    across_data: bool = False
    """True if one of the data-parallel ranks owns the tensor, too; otherwise each of them has it."""

    def shard_of(self, full: Tensor, rank: int, size: int) -> Tensor:
        """Returns a rank's shard of a full tensor; all of a replicated one."""
        if not is_sharded(self.shard):
            return full
        dim, sections = _dim(self.shard), self._sections()
        parts = [full.narrow(dim, start, stop - start) for start, stop in section_slices(sections, rank, size)]
        return torch.cat(parts, dim)

    def assemble(self, shards: Sequence[Tensor]) -> Tensor:
        """Assembles the full tensor from the shards of all ranks; of a replicated one, any is enough."""
        if not is_sharded(self.shard):
            return shards[0]
        dim, sections = _dim(self.shard), self._sections()
        full = shards[0].new_empty(self.shape)
        for rank, shard in enumerate(shards):
            offset = 0
            for start, stop in section_slices(sections, rank, len(shards)):
                full.narrow(dim, start, stop - start).copy_(shard.narrow(dim, offset, stop - start))
                offset += stop - start
        return full

    def _sections(self) -> tuple[int, ...]:
        """Returns the sections of the full tensor, which holds the experts of this rank only."""
        sections = shard_sections(self.shard)
        return sections[: len(sections) // expert_rank_and_size(self.shard)[1]] or (self.shape[_dim(self.shard)],)


def full_shape(parameter: Parameter, size: int) -> torch.Size:
    """Returns the shape of the full tensor of which a parameter is a shard. size: number of tensor-parallel ranks."""
    shape = list(parameter.shape)
    dim = shard_dim(parameter)
    if dim is not None:
        shape[dim] *= size
    return torch.Size(shape)


def unsharded(groups: Groups, factory: OptimizerFactory, axis: Axis) -> torch.optim.Optimizer:
    """Builds an optimizer that updates full tensors; without tensor parallelism the library's own."""
    return factory(groups) if axis.size == 1 else UnshardedOptimizer(groups, factory, axis)


class UnshardedOptimizer(torch.optim.Optimizer):
    """Wraps one optimizer over full tensors and, for Muon, one over the other parameters.

    assigned: sharded parameter -> its owner. clip: scales full tensors after an update; None does not.
    """

    def __init__(
        self,
        groups: Groups,
        factory: OptimizerFactory,
        axis: Axis,
        *,
        other_groups: Groups | None = None,
        other_factory: OptimizerFactory | None = None,
    ) -> None:
        """Assigns owners and builds the inner optimizers. Collective over the axis.

        Args:
            groups: parameter groups that need full tensors.
            factory: builds the optimizer over full tensors.
            axis: tensor-parallel ranks.
            other_groups: parameter groups whose shards are updated separately.
            other_factory: builds their optimizer.
        """
        super().__init__([*groups, *(other_groups or [])], {})
        self._axis = axis
        self.clip: QKClip | None = None
        self.assigned: dict[Parameter, AssignedTensor] = {}
        owners = _owners([parameter for group in groups for parameter in group["params"]], axis)
        self._inner: list[tuple[torch.optim.Optimizer, list[dict[str, Any]]]] = []
        outer_groups = self.param_groups[: len(groups)]
        mine = [{**group, "params": list(self._owned_tensors(group["params"], owners))} for group in groups]
        self._add(factory, mine, outer_groups)
        if other_groups and other_factory is not None:
            self._add(other_factory, other_groups, self.param_groups[len(groups) :])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Gathers gradients, updates full tensors and scatters the shards."""
        assert closure is None, "closures are not supported"
        for assigned in self.assigned.values():
            self._gather(assigned)
        for optimizer, outer_groups in self._inner:
            for group, outer in zip(optimizer.param_groups, outer_groups, strict=True):
                group["lr"] = outer["lr"]
            optimizer.step()
        if self.clip is not None:
            self.clip(self._full_tensor)
        for assigned in self.assigned.values():
            if assigned.shard.grad is not None:
                self._scatter(assigned)

    @torch.no_grad()
    def scatter_weights(self) -> None:
        """Copies the full tensors into the shards of all ranks; collective."""
        for assigned in self.assigned.values():
            self._scatter(assigned)

    def _full_tensor(self, parameter: Parameter) -> Tensor | None:
        """Returns the full tensor of a parameter that was updated here."""
        if parameter.grad is None:
            return None
        full = self.assigned[parameter].full if parameter in self.assigned else parameter
        return None if full is None else full.detach()

    def _add(self, factory: OptimizerFactory, groups: Groups, outer_groups: list[dict[str, Any]]) -> None:
        non_empty = [number for number, group in enumerate(groups) if group["params"]]
        if not non_empty:
            return
        optimizer = factory([dict(groups[number]) for number in non_empty])
        optimizer.state = self.state
        self._inner.append((optimizer, [outer_groups[number] for number in non_empty]))
        for group in outer_groups:
            group.setdefault("lr", optimizer.defaults["lr"])

    def _owned_tensors(self, parameters: Sequence[Parameter], owners: dict[Parameter, int]) -> Iterator[Parameter]:
        """Yields what this rank updates of a group: replicated parameters and the full tensors that it owns."""
        for parameter in parameters:
            if parameter not in owners:
                yield parameter
                continue
            assigned = AssignedTensor(parameter, owners[parameter], full_shape(parameter, self._axis.size), None)
            full = self._gather_full(assigned, parameter.detach())
            owned = None if full is None else Parameter(full)
            if owned is not None:
                copy_structure(parameter, owned)
            self.assigned[parameter] = AssignedTensor(parameter, assigned.owner, assigned.shape, owned)
            if owned is not None:
                yield owned

    def _gather_full(self, assigned: AssignedTensor, shard: Tensor) -> Tensor | None:
        """Returns a full tensor on its owner, None on other ranks."""
        axis = self._axis
        owns = axis.rank == assigned.owner
        shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(axis.size * owns)]
        dist.gather(shard.contiguous(), shards or None, dst=axis.ranks[assigned.owner], group=axis.group)
        return assigned.assemble(shards) if owns else None

    def _gather(self, assigned: AssignedTensor) -> None:
        gradient = assigned.shard.grad
        if gradient is None:
            return  # the same on all ranks, which compute the same graph
        full = self._gather_full(assigned, gradient)
        if assigned.full is not None:
            assigned.full.grad = full

    def _scatter(self, assigned: AssignedTensor) -> None:
        axis = self._axis
        shards = None
        if assigned.full is not None:
            shards = [
                assigned.shard_of(assigned.full.detach(), rank, axis.size).contiguous() for rank in range(axis.size)
            ]
            assigned.full.grad = None
        received = torch.empty_like(assigned.shard.detach(), memory_format=torch.contiguous_format)
        dist.scatter(received, shards, src=axis.ranks[assigned.owner], group=axis.group)
        assigned.shard.detach().copy_(received)


def _dim(parameter: Parameter) -> int:
    dim = shard_dim(parameter)
    assert dim is not None, "only sharded tensors are assigned"
    return dim


def _owners(parameters: Sequence[Parameter], axis: Axis) -> dict[Parameter, int]:
    """Assigns an owner to each sharded parameter: the largest first, each to the rank with the least so far."""
    if axis.size == 1:
        return {}
    load = [0] * axis.size
    owners = {}
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    for parameter in sorted(sharded, key=lambda one: -one.numel()):  # stable, so that all ranks agree
        owners[parameter] = load.index(min(load))
        load[owners[parameter]] += parameter.numel()
    return owners
