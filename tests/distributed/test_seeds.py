"""Which ranks draw the same random numbers from torch's own generator: those that hold copies of one tensor."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from megatron.distributed.init import init_distributed
from megatron.distributed.mesh import Axis
from megatron.distributed.param_init import ParamFactory
from tests.multi_rank import run_cases


def draw(rank: int, world_size: int, pipe: int, context: int) -> tuple[tuple[int, int, int], tuple[float, ...]]:
    """This rank's place along pipe, data and context, and its next numbers."""
    topology = init_distributed(pipe_parallel_size=pipe, context_parallel_size=context, model_parallel_size=2, seed=5)
    position = (topology.pipe.rank, topology.data.rank, topology.context.rank)
    return position, tuple(torch.rand(4).tolist())


LAYOUTS = [(2, 1), (1, 2), (4, 1)]


@pytest.fixture(scope="module")
def drawn_by_ranks() -> dict[Any, list[Any]]:
    return run_cases({layout: (draw, *layout) for layout in LAYOUTS}, 8)


@pytest.mark.parametrize(("pipe", "context"), LAYOUTS)
def test_only_tensor_parallel_ranks_draw_alike(pipe: int, context: int, drawn_by_ranks: dict[Any, list[Any]]) -> None:
    """Were two stages alike, their blocks would drop the same places of the residual stream."""
    drawn = defaultdict(list)
    for position, numbers in drawn_by_ranks[pipe, context]:
        drawn[position].append(numbers)
    assert len(drawn) == 4
    assert all(len(numbers) == 2 and len(set(numbers)) == 1 for numbers in drawn.values())
    assert len({numbers[0] for numbers in drawn.values()}) == 4


def test_no_two_parameters_start_alike() -> None:
    """Seed, layer and name each choose other first values; the same three always give the same."""

    def values(seed: int = 5, layer: int = 2, module: str = "mlp", name: str = "weight") -> tuple[float, ...]:
        source = ParamFactory(seed, layer, Axis("model")).of(module)
        full = source.sharded(name, (4, 4), lambda tensor, generator: tensor.normal_(generator=generator), dim=0)
        return tuple(full.flatten().tolist())

    others = [values(seed=6), values(layer=3), values(module="attention"), values(name="other")]
    assert values() == values()
    assert len({values(), *others}) == 5
