"""Parameters, FLOPs and memory of a model with retrieval in the plan are those of the model that is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.retro_model import RetroModel
from megatron.plan.report import activation_layout, make_plan
from megatron.plan.retro import retro_activations
from tests.end_to_end.runs import BASE
from tests.plan.measured import measure

LENGTH, CHUNK, NEIGHBORS, ROWS, BATCH, WIDTH = 64, 16, 2, 512, 8, 64
SIZES: dict[str, Any] = {
    **BASE,
    "num_layers": 4,
    "num_kv_heads": 4,
    "hidden_size": WIDTH,
    "seq_length": LENGTH,
    "max_position_embeddings": LENGTH,
    "train_batch_size": BATCH,
    "vocab_size": ROWS,
    "retro_add_retriever": True,
    "retro_chunk_length": CHUNK,
    "retro_num_neighbors": NEIGHBORS,
    "retro_cross_attention_layers": [1, 3],
    "retro_encoder_hidden_dropout": 0.0,
    "retro_encoder_attention_dropout": 0.0,
    "data_path": "text",
    "retro_project_dir": "not/built/yet",
}


def test_the_plan_is_that_of_the_model() -> None:
    """Planned before there is a database, as before there are token files."""
    resolution = resolve([], SIZES, Resources(1))
    config, plan = resolution.config, make_plan(resolution)
    spec = ModelSpec(
        config.model,
        config.initialization,
        config.kernels,
        padded_vocab_size=ROWS,
        topology=Topology.single(),
        seed=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    dims = spec.dims
    assert dims.retro is not None
    model = RetroModel(build_layer_specs(spec), dims.retro).train()
    assert plan.parameters == sum(each.numel() for each in model.parameters())

    read = LENGTH * NEIGHBORS * 2
    tokens = torch.randint(0, ROWS, (BATCH, read + LENGTH))
    targets = TokenTargets(tokens[:, :LENGTH].t(), torch.zeros(LENGTH, BATCH))
    products, saved = measure(model, lambda: model(tokens, targets=targets), ROWS)
    products += ROWS * WIDTH * BATCH * LENGTH  # of the output layer
    pairs = 4 * LENGTH * LENGTH + 2 * LENGTH * NEIGHBORS * 2 * CHUNK + 2 * read * 2 * CHUNK + read * CHUNK
    assert plan.flops_per_iteration == 3 * (2 * products + 4 * BATCH * pairs * WIDTH)
    layout = activation_layout(config)
    assert sum(retro_activations(dims, layout, block) for block in range(4)) == pytest.approx(saved, rel=0.1)
