"""The device mesh: axes of a run (pipe, data, context, model) and their process groups.

One Topology is built per process and passed on; there is no global one. Ranks are numbered with the pipe axis
outermost, then data, context and model. Tensor-parallel ranks (the model axis) communicate most, so they are adjacent:

    rank = ((pipe_rank * data_size + data_rank) * context_size + context_rank) * model_size + model_rank

The same object is the `mpu` argument of DeepSpeed, when the model is not a pipeline. Source of the order: DeepSpeed's
PipeModelDataParallelTopology and the public GPT-NeoX layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, as this rank sees it."""

    name: str
    """Name of the axis."""
    size: int = 1
    """Number of ranks along the axis."""
    rank: int = 0
    """Index of this rank, 0 <= rank < size."""
    ranks: tuple[int, ...] = (0,)
    """Global ranks that differ from this one only along this axis, in order."""
    group: Group = None
    """Their process group; None if none was initialized."""
    sequence_parallel: bool = False
    """True if each rank has a shard of the sequence between tensor-parallel regions."""
    fp32_reduce: bool = False
    """True if tensors of lower precision are summed over these ranks in fp32."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Topology:
    """The axes of this rank, and the groups that DeepSpeed asks for."""

    rank: int
    """Global rank."""
    world_size: int
    """Number of ranks."""
    pipe: Axis
    """Pipeline stages."""
    data: Axis
    """Data-parallel ranks."""
    context: Axis
    """Ranks that share a sequence."""
    model: Axis
    """Tensor-parallel ranks."""
    model_parallel: Axis
    """Ranks that together hold one copy of the model (pipe x model)."""
    dp_cp: Axis
    """Ranks that hold the same shard of the model and sum its gradient (data x context)."""
    expert: Axis = field(default_factory=lambda: Axis("expert"))
    """Ranks of dp_cp over which the experts of a block are distributed; neighbours along it."""
    ulysses: Axis = field(default_factory=lambda: Axis("ulysses"))
    """Ranks of context that exchange shards of a sequence for heads; neighbours along it."""
    ring: Axis = field(default_factory=lambda: Axis("ring"))
    """Ranks of context that pass keys and values on: one of each group of `ulysses`."""
    zigzag: bool = field(default=True, kw_only=True)
    """Whether each member of a ring has two chunks of a sequence, for equal work; else shards follow each other."""
    expert_data: Axis = field(default_factory=lambda: Axis("expert_data"))
    """Ranks of dp_cp that hold the same experts of a block."""
    key_head: Axis = field(default_factory=lambda: Axis("key_head"))
    """Tensor-parallel ranks that share a key head, where there are more of them than key heads; neighbours."""

    @staticmethod
    def single() -> Topology:
        """Returns the topology of a single process, without process groups."""
        names = ("pipe", "data", "context", "model", "model_parallel", "dp_cp")
        return Topology(0, 1, *(Axis(name) for name in names))

    @staticmethod
    def build(
        *,
        pipe: int,
        model: int,
        rank: int,
        world_size: int,
        context: int = 1,
        sequence_parallel: bool = False,
        fp32_reduce: bool = False,
        expert: int = 1,
        ulysses: int | None = None,
        zigzag: bool = True,
        key_head: int = 1,
    ) -> Topology:
        """Creates the process groups. Collective: every rank calls it with the same sizes.

        Raises ValueError if the sizes do not divide world_size (the configuration rules report that earlier).

        Args:
            pipe: size of the pipe axis.
            model: size of the model axis.
            rank: global rank of this process.
            world_size: number of processes; the data axis gets what the other axes leave.
            context: size of the context axis.
            sequence_parallel: property of the model axis.
            fp32_reduce: property of the model axis.
            expert: ranks over which experts are distributed.
            ulysses: context-parallel ranks that exchange shards for heads; the whole context axis unless set.
            zigzag: false if shards follow each other also with a ring.
            key_head: tensor-parallel ranks that share a key head.
        """
        if world_size % (pipe * context * model):
            sizes_text = f"pipe {pipe} x context {context} x model {model}"
            raise ValueError(f"{sizes_text} does not divide the world size {world_size}")
        data = world_size // (pipe * context * model)
        sizes = {"pipe": pipe, "data": data, "context": context, "model": model}
        axes: dict[str, Any] = {name: _axis(name, sizes, rank, (name,)) for name in sizes}
        axes["model"] = replace(
            axes["model"], sequence_parallel=sequence_parallel and model > 1, fp32_reduce=fp32_reduce
        )
        axes["model_parallel"] = _axis("model_parallel", sizes, rank, ("pipe", "model"))
        axes["dp_cp"] = _axis("dp_cp", sizes, rank, ("data", "context"))
        axes["ulysses"], axes["ring"] = _context_parts(axes["context"], sizes, ulysses or context)
        if key_head > 1:
            every = [
                ranks[first : first + key_head]
                for ranks in _slices(sizes, ("model",))
                for first in range(0, model, key_head)
            ]
            axes["key_head"] = _of_slices("key_head", every, rank)
        if expert > 1:
            axes["expert"] = _expert_axis(expert, pipe=pipe, model=model, data=data * context)
            axes["expert_data"] = _expert_data_axis(axes["expert"], axes["dp_cp"])
        return Topology(rank, world_size, **axes, zigzag=zigzag)

    # The mpu interface of DeepSpeed. Context-parallel ranks are data-parallel to it: with a context axis of its own it
    # would sum over it at ZeRO 0 to 2 but average at ZeRO 3, which also partitions by the data-parallel group.

    def get_model_parallel_rank(self) -> int:
        return self.model.rank

    def get_model_parallel_world_size(self) -> int:
        return self.model.size

    def get_model_parallel_group(self) -> Group:
        return self.model.group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.model.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.model.size

    def get_tensor_model_parallel_group(self) -> Group:
        return self.model.group

    def get_data_parallel_rank(self) -> int:
        return self.dp_cp.rank

    def get_data_parallel_world_size(self) -> int:
        return self.dp_cp.size

    def get_data_parallel_group(self) -> Group:
        return self.dp_cp.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self.dp_cp.ranks)


def expert_group_name(size: int) -> str:
    """Returns DeepSpeed's name of the expert-parallel groups of that size."""
    return f"ep_size_{size}"


def _expert_axis(size: int, *, pipe: int, model: int, data: int) -> Axis:
    """Creates the expert axis in DeepSpeed's own groups, which its engine looks up by name."""
    from deepspeed.utils import groups

    if data % size:
        raise ValueError(f"{size} expert-parallel ranks do not divide {data} data-parallel ranks")
    sizes = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: model, get_pipe_parallel_world_size=lambda: pipe
    )
    groups._create_expert_data_and_model_parallel(size, sizes)
    name = expert_group_name(size)
    ranks = tuple(groups._get_expert_parallel_group_ranks(name))
    return Axis("expert", size, ranks.index(dist.get_rank()), ranks, groups._get_expert_parallel_group(name))


def _context_parts(context: Axis, sizes: dict[str, int], ulysses: int) -> tuple[Axis, Axis]:
    """Returns the parts of the context axis: its groups of that many neighbours, and the rings across them."""
    if context.size % ulysses:
        raise ValueError(f"{ulysses} Ulysses ranks do not divide {context.size} context-parallel ranks")
    rank = context.ranks[context.rank]
    if ulysses == context.size:
        return replace(context, name="ulysses"), Axis("ring", ranks=(rank,))
    if ulysses == 1:
        return Axis("ulysses", ranks=(rank,)), replace(context, name="ring")
    every = list(_slices(sizes, ("context",)))
    neighbours = [ranks[first : first + ulysses] for ranks in every for first in range(0, len(ranks), ulysses)]
    rings = [ranks[first::ulysses] for ranks in every for first in range(ulysses)]
    return _of_slices("ulysses", neighbours, rank), _of_slices("ring", rings, rank)


def _expert_data_axis(expert: Axis, dp_cp: Axis) -> Axis:
    """Returns the data-parallel ranks that hold the same experts as this one, in DeepSpeed's group of them."""
    from deepspeed.utils import groups

    ranks = dp_cp.ranks[expert.rank :: expert.size]
    group = groups._get_expert_data_parallel_group(expert_group_name(expert.size))
    return Axis("expert_data", len(ranks), dp_cp.rank // expert.size, ranks, group)


def _axis(name: str, sizes: dict[str, int], rank: int, along: tuple[str, ...]) -> Axis:
    """Returns this rank's Axis along the named dimensions, after creating every such group of the world."""
    return _of_slices(name, _slices(sizes, along), rank)


def _of_slices(name: str, slices: Iterable[tuple[int, ...]], rank: int) -> Axis:
    """Returns the Axis of the slice with this rank, after creating the groups of all of them."""
    mine: Axis | None = None
    for ranks in slices:
        # Every rank must create every group, in the same order, even those it is not a member of.
        group = dist.new_group(list(ranks)) if dist.is_initialized() else None
        if rank in ranks:
            mine = Axis(name, len(ranks), ranks.index(rank), ranks, group)
    assert mine is not None
    return mine


def _slices(sizes: dict[str, int], along: tuple[str, ...]) -> Iterator[tuple[int, ...]]:
    """Yields the sets of ranks that agree on every axis but those in `along`, each in rank order."""
    slices: dict[tuple[int, ...], list[int]] = {}
    for rank in range(prod(sizes.values())):
        coords = coordinates(rank, data=sizes["data"], context=sizes["context"], model=sizes["model"])
        fixed = tuple(index for name, index in coords.items() if name not in along)
        slices.setdefault(fixed, []).append(rank)
    yield from (tuple(ranks) for ranks in slices.values())


def coordinates(rank: int, *, data: int, model: int, context: int = 1) -> dict[str, int]:
    """Returns the index of a global rank along pipe, data, context and model.

    Args:
        rank: global rank.
        data: size of the data axis.
        model: size of the model axis.
        context: size of the context axis.
    """
    return {
        "pipe": rank // (data * context * model),
        "data": rank // (context * model) % data,
        "context": rank // model % context,
        "model": rank % model,
    }
