"""Parameters, FLOPs and memory of an encoder-decoder in the plan are those of the model that is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.sequential_model import SequentialModel
from megatron.param_table import ModelDims
from megatron.plan.encoder_decoder import two_stack_activations
from megatron.plan.report import activation_layout, make_plan
from tests.end_to_end.test_encoder_decoder_layouts import BASE, PUBLIC
from tests.plan.measured import measure

SOURCE, TARGET, ROWS, BATCH = 128, 64, 512, 8
SIZES: dict[str, Any] = {
    "encoder_seq_length": SOURCE,
    "decoder_seq_length": TARGET,
    "hidden_size": 64,
    "train_batch_size": BATCH,
    "vocab_size": ROWS,
    "encoder_num_layers": 2,
    "decoder_num_layers": 3,
}


@pytest.mark.parametrize("form", [{}, PUBLIC], ids=["megatron", "public"])
def test_the_plan_is_that_of_the_model(form: dict[str, Any]) -> None:
    resolution = resolve([], {**BASE, **form, **SIZES}, Resources(1))
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
    model = SequentialModel(build_layer_specs(spec)).train()
    assert plan.parameters == sum(each.numel() for each in model.parameters())

    tokens = torch.randint(0, ROWS, (BATCH, SOURCE + TARGET))
    real = torch.zeros(BATCH, SOURCE, dtype=torch.int64)  # padding would be left out on a CPU
    starts = torch.cat((real, torch.full((BATCH, TARGET), SOURCE)), dim=1)

    def run() -> None:
        hidden = tokens
        for layer in list(model.sequential)[:-2]:
            hidden = layer(hidden, None, starts)

    products, saved = measure(model, run, ROWS)
    products += ROWS * 64 * BATCH * TARGET  # of the output layer
    row = 2 * SOURCE * SOURCE + 3 * TARGET * (SOURCE + TARGET)
    for module in (model.sequential[1:-2]).modules():
        assert not isinstance(module, nn.Linear)  # the hooks have seen every product
    assert plan.flops_per_iteration == 3 * (2 * products + 4 * BATCH * row * 64)
    of_block, dims, layout = two_stack_activations(config), ModelDims.of(config.model), activation_layout(config)
    assert sum(of_block(dims, layout, block) for block in range(5)) == pytest.approx(saved, rel=0.08)
    assert f"2 encoder and 3 decoder blocks x {64}" in plan.text()
    assert f"{BATCH * (SOURCE + TARGET):,} tokens a step at sequence length 128 + 64" in plan.text()
