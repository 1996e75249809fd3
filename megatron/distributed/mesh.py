"""Which rank holds what: the axes of a run (pipe, data, context, model) and their process groups.

One Topology is built per process and passed to whoever needs it; nothing here is looked up globally. Ranks are
numbered with the pipe axis outermost, then data, context and model, so that a tensor-parallel group (the most
talkative) sits on neighbouring ranks:

    rank = ((pipe_rank * data_size + data_rank) * context_size + context_rank) * model_size + model_rank

The same object answers the questions that DeepSpeed asks of its `mpu` argument, when the model is not a pipeline.
Source of the order: DeepSpeed's PipeModelDataParallelTopology and the public GPT-NeoX layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from types import SimpleNamespace

import torch.distributed as dist

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Axis:
    """This rank's place along one axis.

    size: number of ranks along it. rank: this rank's index, 0 <= rank < size. ranks: the global ranks that differ
    from this one only along this axis, in order. group: their process group; None where none was initialised.
    sequence: between tensor-parallel regions each of these ranks holds its part of the sequence only (Megatron
    sequence parallelism). fp32_reduce: tensors of lower precision are summed over these ranks in fp32.
    """

    name: str
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: Group = None
    sequence: bool = False
    fp32_reduce: bool = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Topology:
    """The axes of this rank, and the groups that DeepSpeed asks for.

    pipe, data, context, model: the axes. replica: all ranks that together hold one copy of the model (pipe x model).
    gradient: all ranks that hold the same slice of the model and so sum its gradient (data x context). expert: those of
    them over which the experts of a block are spread; neighbours along gradient.
    """

    rank: int
    world_size: int
    pipe: Axis
    data: Axis
    context: Axis
    model: Axis
    replica: Axis
    gradient: Axis
    expert: Axis = field(default_factory=lambda: Axis("expert"))

    @staticmethod
    def single() -> Topology:
        """The topology of one process, with no process group at all."""
        names = ("pipe", "data", "context", "model", "replica", "gradient")
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
    ) -> Topology:
        """Creates the process groups; collective: every rank calls it with the same sizes.

        pipe, context and model: sizes of those axes; the data axis takes what is left of world_size.
        sequence_parallel, fp32_reduce: properties of the model axis. expert: ranks over which experts are spread.
        Raises ValueError if the sizes do not divide world_size (the configuration rules say so earlier).
        """
        if world_size % (pipe * context * model):
            told = f"pipe {pipe} x context {context} x model {model}"
            raise ValueError(f"{told} does not divide the world size {world_size}")
        data = world_size // (pipe * context * model)
        sizes = {"pipe": pipe, "data": data, "context": context, "model": model}
        axes = {name: _axis(name, sizes, rank, (name,)) for name in sizes}
        axes["model"] = replace(axes["model"], sequence=sequence_parallel and model > 1, fp32_reduce=fp32_reduce)
        axes["replica"] = _axis("replica", sizes, rank, ("pipe", "model"))
        axes["gradient"] = _axis("gradient", sizes, rank, ("data", "context"))
        if expert > 1:
            axes["expert"] = _expert_axis(expert, pipe=pipe, model=model, data=data * context)
        return Topology(rank, world_size, **axes)

    # What DeepSpeed asks of an mpu. Ranks that share a sequence are data-parallel to it: told of the context axis, it
    # would sum over it at ZeRO 0 to 2 and average at ZeRO 3, which also cuts parameters by the data-parallel group.

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
        return self.gradient.rank

    def get_data_parallel_world_size(self) -> int:
        return self.gradient.size

    def get_data_parallel_group(self) -> Group:
        return self.gradient.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self.gradient.ranks)


def expert_group_name(size: int) -> str:
    """DeepSpeed's name of the groups that spread experts over that many ranks."""
    return f"ep_size_{size}"


def _expert_axis(size: int, *, pipe: int, model: int, data: int) -> Axis:
    """The ranks over which experts are spread, in DeepSpeed's own groups, which its engine looks up by name."""
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


def _axis(name: str, sizes: dict[str, int], rank: int, along: tuple[str, ...]) -> Axis:
    """This rank's Axis along the named dimensions, after creating every such group of the world."""
    mine: Axis | None = None
    for ranks in _slices(sizes, along):
        # Every rank must create every group, in the same order, even those it is not part of.
        group = dist.new_group(list(ranks)) if dist.is_initialized() else None
        if rank in ranks:
            mine = Axis(name, len(ranks), ranks.index(rank), ranks, group)
    assert mine is not None
    return mine


def _slices(sizes: dict[str, int], along: tuple[str, ...]) -> Iterator[tuple[int, ...]]:
    """All sets of ranks that agree on every axis but those in `along`, each in rank order."""
    slices: dict[tuple[int, ...], list[int]] = {}
    for rank in range(prod(sizes.values())):
        place = coordinates(rank, data=sizes["data"], context=sizes["context"], model=sizes["model"])
        fixed = tuple(index for name, index in place.items() if name not in along)
        slices.setdefault(fixed, []).append(rank)
    yield from (tuple(ranks) for ranks in slices.values())


def coordinates(rank: int, *, data: int, model: int, context: int = 1) -> dict[str, int]:
    """The place of a global rank: its index along pipe, data, context and model, given the sizes of the last three."""
    return {
        "pipe": rank // (data * context * model),
        "data": rank // (context * model) % data,
        "context": rank // model % context,
        "model": rank % model,
    }
