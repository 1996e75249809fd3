"""Parameter groups: rates, decay, and as many of them on every pipeline stage."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from megatron.distributed.init import init_distributed
from megatron.distributed.param_attrs import mark_no_weight_decay
from megatron.errors import RunError
from megatron.optim.param_groups import LR_SCALE, balance_group_count, parameter_groups, set_learning_rate
from tests.multi_rank import RankFailedError, run_distributed


def test_a_group_for_every_rate_and_the_same_decay_of_weights() -> None:
    matrix, table, bias = (Parameter(torch.ones(2)) for _ in range(3))
    mark_no_weight_decay(bias)
    groups = parameter_groups([matrix, table, bias], 0.1, {matrix: 0.25})
    set_learning_rate(groups, 0.01)
    found = [(group["name"], group["lr"], group["weight_decay"], group["params"]) for group in groups]
    assert found == [
        ("decayed at 0.25", 0.0025, 0.4, [matrix]),
        ("decayed", 0.01, 0.1, [table]),
        ("plain", 0.01, 0.0, [bias]),
    ]


def stage_groups(rank: int, world_size: int, counts: list[list[int]]) -> list[int]:
    """Sizes of the groups of a stage that had groups of the given sizes."""
    topology = init_distributed(pipe_parallel_size=world_size, model_parallel_size=1, seed=1, backend="gloo")
    groups = [{"params": [Parameter(torch.ones(1)) for _ in range(count)], LR_SCALE: 0.5} for count in counts[rank]]
    made = balance_group_count(groups, topology.pipe, torch.device("cpu"))
    assert all(group[LR_SCALE] == 0.5 for group in made)
    before, after = ([p for group in some for p in group["params"]] for some in (groups, made))
    assert all(a is b for a, b in zip(before, after, strict=True))
    return [len(group["params"]) for group in made]


def test_stages_get_as_many_groups() -> None:
    assert run_distributed(stage_groups, 2, [[3, 1, 2], [5]]) == [[3, 1, 2], [2, 1, 2]]


def test_a_stage_with_too_few_parameters_is_reported() -> None:
    with pytest.raises(RankFailedError, match=f"{RunError.__name__}: this pipeline stage has fewer parameters"):
        run_distributed(stage_groups, 2, [[3, 1, 2], [2]])
