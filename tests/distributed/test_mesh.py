"""Which ranks sit together: the rank order, and the groups of every axis."""

from __future__ import annotations

import itertools

import pytest

from megatron.distributed.mesh import Topology, coordinates

AXES = ("pipe", "data", "context", "model", "model_parallel", "dp_cp")


def groups(pipe: int, context: int, model: int, world_size: int) -> dict[str, set[tuple[int, ...]]]:
    """Every group of every axis, without process groups."""
    found: dict[str, set[tuple[int, ...]]] = {name: set() for name in AXES}
    for rank in range(world_size):
        topology = Topology.build(pipe=pipe, context=context, model=model, rank=rank, world_size=world_size)
        for name in AXES:
            axis = getattr(topology, name)
            assert axis.ranks[axis.rank] == rank
            assert axis.size == len(axis.ranks)
            found[name].add(axis.ranks)
    return found


def test_rank_order() -> None:
    """Model innermost, then context, data and pipe."""
    found = groups(pipe=2, context=2, model=2, world_size=16)
    assert (0, 1) in found["model"]
    assert (0, 2) in found["context"]
    assert (0, 4) in found["data"]
    assert (0, 8) in found["pipe"]
    assert (0, 2, 4, 6) in found["dp_cp"]
    assert (0, 1, 8, 9) in found["model_parallel"]


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2, 3), repeat=4)))
def test_every_axis_splits_the_world(sizes: tuple[int, int, int, int]) -> None:
    pipe, data, context, model = sizes
    world_size = pipe * data * context * model
    for name, found in groups(pipe, context, model, world_size).items():
        assert sorted(itertools.chain.from_iterable(found)) == list(range(world_size)), name
    positions = [
        tuple(coordinates(rank, data=data, context=context, model=model).values()) for rank in range(world_size)
    ]
    assert positions == list(itertools.product(*map(range, sizes)))


@pytest.mark.parametrize(("context", "ulysses"), [(4, 4), (4, 2), (4, 1), (6, 2), (6, 3), (1, 1)])
def test_context_ranks_are_groups_of_neighbours_and_rings(context: int, ulysses: int) -> None:
    """Rank along context = member of the ring x ranks that exchange heads + rank among these."""
    world_size = 2 * context * 2
    for rank in range(world_size):
        topology = Topology.build(pipe=1, context=context, model=2, rank=rank, world_size=world_size, ulysses=ulysses)
        shared, near, ring = topology.context, topology.ulysses, topology.ring
        assert (near.size, ring.size) == (ulysses, context // ulysses)
        assert shared.rank == ring.rank * ulysses + near.rank
        assert near.ranks == shared.ranks[ring.rank * ulysses :][:ulysses]
        assert ring.ranks == shared.ranks[near.rank :: ulysses]
        assert near.ranks[near.rank] == ring.ranks[ring.rank] == rank


def test_groups_that_do_not_divide_the_context_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 Ulysses ranks do not divide 4 context-parallel ranks"):
        Topology.build(pipe=1, context=4, model=1, rank=0, world_size=4, ulysses=3)


def test_an_uneven_world_is_refused() -> None:
    with pytest.raises(ValueError, match="pipe 1 x context 2 x model 2 does not divide the world size 6"):
        Topology.build(pipe=1, context=2, model=2, rank=0, world_size=6)
