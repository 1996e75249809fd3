"""Partition of layers into pipeline stages: every method, compared with the planner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.config.derived.attention import layer_classes
from megatron.distributed.mesh import Topology
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.pipeline_model import PipelinedModel
from megatron.param_table import ModelDims, tensors
from megatron.plan.stages import stage_bounds
from tests.model.sections import VOCABULARY, initialization_section, model_section
from tests.multi_rank import run_cases

LAYERS = 4
METHODS = ["uniform", "parameters", "type:transformer|mlp", "type:transformer|embedding", (1, 3), (4, 0), (0, 4)]


def stage(rank: int, size: int, method: str | tuple[int, ...], changes: dict[str, Any]) -> range:
    """The plan indices of this rank's layers."""
    topology = Topology.build(pipe=size, model=1, rank=rank, world_size=size)
    plan = build_layer_specs(
        ModelSpec(
            model_section(num_layers=LAYERS, **changes),
            initialization_section(),
            SimpleNamespace(),
            padded_vocab_size=VOCABULARY,
            topology=topology,
            seed=1,
            dtype=torch.float32,
        )
    )
    return PipelinedModel(plan, topology, partition_method=method, loss=torch.nn.functional.cross_entropy).layer_range


CHANGES = {"no_weight_tying": True}


@pytest.fixture(scope="module")
def stages() -> dict[Any, list[range]]:
    """Method -> the layers of each rank."""
    return run_cases({method: (stage, method, CHANGES) for method in METHODS}, 2)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_stages_are_those_of_the_planner(method: str | tuple[int, ...], stages: dict[Any, list[range]]) -> None:
    counts = [0] * (LAYERS + 5)
    for shape in tensors(ModelDims.of(model_section(num_layers=LAYERS, **CHANGES)), VOCABULARY):
        counts[shape.layer] += shape.count
    bounds = stage_bounds(method, layer_classes(LAYERS), counts, 2)
    assert stages[method] == [range(*bounds[:2]), range(*bounds[1:])]
    if isinstance(method, tuple):
        assert bounds[1] == 2 + method[0]
