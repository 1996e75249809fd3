"""Which rank holds what: the three axes of a run (pipe, data, model) and their process groups.

One Topology is built per process and passed to whoever needs it; nothing here is looked up globally. Ranks are
numbered with the pipe axis outermost, then data, then model, so that a tensor-parallel group (the most talkative)
sits on neighbouring ranks:

    rank = (pipe_rank * data_size + data_rank) * model_size + model_rank

The same object answers the questions that DeepSpeed asks of its `mpu` argument, when the model is not a pipeline.
Source of the order: DeepSpeed's PipeModelDataParallelTopology and the public GPT-NeoX layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Axis:
    """This rank's place along one axis.

    size: number of ranks along it. rank: this rank's index, 0 <= rank < size. ranks: the global ranks that differ
    from this one only along this axis, in order. group: their process group; None where none was initialised.
    """

    name: str
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: Group = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Topology:
    """The axes of this rank, and the groups that DeepSpeed asks for.

    pipe, data, model: the three axes. replica: all ranks that together hold one copy of the model (pipe x model).
    """

    rank: int
    world_size: int
    pipe: Axis
    data: Axis
    model: Axis
    replica: Axis

    @staticmethod
    def single() -> Topology:
        """The topology of one process, with no process group at all."""
        return Topology(0, 1, Axis("pipe"), Axis("data"), Axis("model"), Axis("replica"))

    @staticmethod
    def build(*, pipe: int, model: int, rank: int, world_size: int) -> Topology:
        """Creates the process groups; collective: every rank calls it with the same sizes.

        pipe and model: sizes of those axes; the data axis takes what is left of world_size.
        Raises ValueError if pipe x model does not divide world_size (the configuration rules say so earlier).
        """
        if world_size % (pipe * model):
            raise ValueError(f"pipe {pipe} x model {model} does not divide the world size {world_size}")
        data = world_size // (pipe * model)
        sizes = {"pipe": pipe, "data": data, "model": model}
        axes = {name: _axis(name, sizes, rank, (name,)) for name in sizes}
        replica = _axis("replica", sizes, rank, ("pipe", "model"))
        return Topology(rank, world_size, axes["pipe"], axes["data"], axes["model"], replica)

    # What DeepSpeed asks of an mpu.

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
        return self.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self.data.size

    def get_data_parallel_group(self) -> Group:
        return self.data.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self.data.ranks)


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
    names = ("pipe", "data", "model")
    slices: dict[tuple[int, ...], list[int]] = {}
    for rank in range(sizes["pipe"] * sizes["data"] * sizes["model"]):
        place = coordinates(rank, data=sizes["data"], model=sizes["model"])
        fixed = tuple(place[name] for name in names if name not in along)
        slices.setdefault(fixed, []).append(rank)
    yield from (tuple(ranks) for ranks in slices.values())


def coordinates(rank: int, *, data: int, model: int) -> dict[str, int]:
    """The place of a global rank: its index along pipe, data and model, given the data and model sizes."""
    return {"pipe": rank // (data * model), "data": rank // model % data, "model": rank % model}
