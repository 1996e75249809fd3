"""Optimizers whose update of a tensor needs all of it, over tensors that tensor parallelism has cut.

Muon orthogonalises a matrix; SM3 and Adafactor keep one number a row and one a column. Of a slice they would compute
something else. So each cut tensor has an owner among the tensor-parallel ranks: gradients are gathered to it, it holds
the tensor whole, updates it and sends the slices back. Owners are dealt by size, so memory and work are shared out as
evenly as whole tensors allow. Tensors that every rank holds are updated on every rank alike.

The optimizers inside are those of the libraries, unchanged. `state` is theirs, by the tensor that they update.
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
from megatron.distributed.param_attrs import is_sharded, shard_dim, shard_sections
from megatron.optim.builder_args import Groups
from megatron.param_table import section_slices

Make = Callable[[Groups], torch.optim.Optimizer]


@dataclass(frozen=True)
class AssignedTensor:
    """A cut tensor and its owner. shard: this rank's slice. whole: the tensor, on the owner only."""

    shard: Parameter
    owner: int
    shape: torch.Size
    whole: Parameter | None

    def cut(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """The slice of a whole tensor that a tensor-parallel rank holds."""
        dim = _dim(self.shard)
        sections = shard_sections(self.shard) or (whole.shape[dim],)
        parts = [whole.narrow(dim, start, stop - start) for start, stop in section_slices(sections, rank, size)]
        return torch.cat(parts, dim)

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole tensor from the slices of all ranks."""
        dim = _dim(self.shard)
        whole = shards[0].new_empty(self.shape)
        sections = shard_sections(self.shard) or (whole.shape[dim],)
        for rank, shard in enumerate(shards):
            offset = 0
            for start, stop in section_slices(sections, rank, len(shards)):
                whole.narrow(dim, start, stop - start).copy_(shard.narrow(dim, offset, stop - start))
                offset += stop - start
        return whole


def unsharded(groups: Groups, make: Make, axis: Axis) -> torch.optim.Optimizer:
    """An optimizer that updates whole tensors; the library's own where tensor parallelism cuts nothing."""
    return make(groups) if axis.size == 1 else UnshardedOptimizer(groups, make, axis)


class UnshardedOptimizer(torch.optim.Optimizer):
    """One optimizer to the outside; inside, one over whole tensors and, for Muon, one over the other parameters.

    dealt: cut parameter -> who owns it. others, make_others: groups whose slices may be updated one by one.
    """

    def __init__(
        self,
        groups: Groups,
        make: Make,
        axis: Axis,
        *,
        others: Groups | None = None,
        make_others: Make | None = None,
    ) -> None:
        super().__init__([*groups, *(others or [])], {})
        self._axis = axis
        self.dealt: dict[Parameter, AssignedTensor] = {}
        owners = _owners([parameter for group in groups for parameter in group["params"]], axis)
        self._inner: list[tuple[torch.optim.Optimizer, list[dict[str, Any]]]] = []
        shown = self.param_groups[: len(groups)]
        mine = [{**group, "params": list(self._mine(group["params"], owners))} for group in groups]
        self._add(make, mine, shown)
        if others and make_others is not None:
            self._add(make_others, others, self.param_groups[len(groups) :])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Gathers gradients, updates, sends slices back."""
        assert closure is None, "nobody computes gradients in here"
        for dealt in self.dealt.values():
            self._gather(dealt)
        for optimizer, shown in self._inner:
            for group, outer in zip(optimizer.param_groups, shown, strict=True):
                group["lr"] = outer["lr"]
            optimizer.step()
        for dealt in self.dealt.values():
            self._scatter(dealt)

    def _add(self, make: Make, groups: Groups, shown: list[dict[str, Any]]) -> None:
        kept = [number for number, group in enumerate(groups) if group["params"]]
        if not kept:
            return
        optimizer = make([dict(groups[number]) for number in kept])
        optimizer.state = self.state
        self._inner.append((optimizer, [shown[number] for number in kept]))
        for group in shown:
            group.setdefault("lr", optimizer.defaults["lr"])

    def _mine(self, parameters: Sequence[Parameter], owners: dict[Parameter, int]) -> Iterator[Parameter]:
        """What this rank updates of a group: replicas themselves, of cut tensors the whole ones that it owns."""
        for parameter in parameters:
            if parameter not in owners:
                yield parameter
                continue
            dim = _dim(parameter)
            shape = list(parameter.shape)
            shape[dim] *= self._axis.size
            dealt = AssignedTensor(parameter, owners[parameter], torch.Size(shape), None)
            whole = self._collect(dealt, parameter.detach())
            owned = None if whole is None else Parameter(whole)
            self.dealt[parameter] = AssignedTensor(parameter, dealt.owner, dealt.shape, owned)
            if owned is not None:
                yield owned

    def _collect(self, dealt: AssignedTensor, shard: Tensor) -> Tensor | None:
        """The whole of a cut tensor, on its owner."""
        axis = self._axis
        owns = axis.rank == dealt.owner
        shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(axis.size * owns)]
        dist.gather(shard.contiguous(), shards or None, dst=axis.ranks[dealt.owner], group=axis.group)
        return dealt.join(shards) if owns else None

    def _gather(self, dealt: AssignedTensor) -> None:
        gradient = dealt.shard.grad
        if gradient is None:
            return  # on no rank then: all of them compute the same graph
        whole = self._collect(dealt, gradient)
        if dealt.whole is not None:
            dealt.whole.grad = whole

    def _scatter(self, dealt: AssignedTensor) -> None:
        axis = self._axis
        if dealt.shard.grad is None:
            return
        shards = None
        if dealt.whole is not None:
            shards = [dealt.cut(dealt.whole.detach(), rank, axis.size).contiguous() for rank in range(axis.size)]
            dealt.whole.grad = None
        received = torch.empty_like(dealt.shard.detach(), memory_format=torch.contiguous_format)
        dist.scatter(received, shards, src=axis.ranks[dealt.owner], group=axis.group)
        dealt.shard.detach().copy_(received)


def _dim(parameter: Parameter) -> int:
    dim = shard_dim(parameter)
    assert dim is not None, "only cut tensors are dealt"
    return dim


def _owners(parameters: Sequence[Parameter], axis: Axis) -> dict[Parameter, int]:
    """Cut parameter -> owner: the largest first, each to the rank that has the least so far."""
    if axis.size == 1:
        return {}
    load = [0] * axis.size
    owners = {}
    cut = [parameter for parameter in parameters if is_sharded(parameter)]
    for parameter in sorted(cut, key=lambda one: -one.numel()):  # stable, so every rank deals alike
        owners[parameter] = load.index(min(load))
        load[owners[parameter]] += parameter.numel()
    return owners
