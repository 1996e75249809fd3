"""Which ranks draw the same random numbers from torch's own generator: those that hold copies of one tensor."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from megatron.distributed.init import init_distributed
from tests.multi_rank import run_distributed


def draw(rank: int, world_size: int, pipe: int, context: int) -> tuple[tuple[int, int, int], tuple[float, ...]]:
    """This rank's place along pipe, data and context, and its next numbers."""
    topology = init_distributed(pipe_parallel_size=pipe, context_parallel_size=context, model_parallel_size=2, seed=5)
    position = (topology.pipe.rank, topology.data.rank, topology.context.rank)
    return position, tuple(torch.rand(4).tolist())


@pytest.mark.parametrize(("pipe", "context"), [(2, 1), (1, 2), (4, 1)])
def test_only_tensor_parallel_ranks_draw_alike(pipe: int, context: int) -> None:
    """Were two stages alike, their blocks would drop the same places of the residual stream."""
    drawn = defaultdict(list)
    for position, numbers in run_distributed(draw, 8, pipe, context):
        drawn[position].append(numbers)
    assert len(drawn) == 4
    assert all(len(numbers) == 2 and len(set(numbers)) == 1 for numbers in drawn.values())
    assert len({numbers[0] for numbers in drawn.values()}) == 4
