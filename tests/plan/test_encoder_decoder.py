"""Parameters, FLOPs and memory of an encoder-decoder in the plan are those of the model that is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.sequential_model import SequentialModel
from megatron.param_table import ModelDims
from megatron.plan.encoder_decoder import two_stack_activations
from megatron.plan.report import activation_layout, make_plan
from tests.end_to_end.test_encoder_decoder_layouts import BASE, PUBLIC

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
    parameters = list(model.parameters())
    assert plan.parameters == sum(each.numel() for each in parameters)

    products = [ROWS * 64 * BATCH * TARGET]  # of the output layer

    def count(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        products.append(module.weight.numel() * inputs[0].shape[0] * inputs[0].shape[1])

    def is_product(module: nn.Module) -> bool:
        return isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.weight.shape[0] != ROWS

    for module in filter(is_product, model.modules()):
        module.register_forward_hook(count)
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = torch.randint(0, ROWS, (BATCH, SOURCE + TARGET))
    real = torch.zeros(BATCH, SOURCE, dtype=torch.int64)  # padding would be left out on a CPU
    starts = torch.cat((real, torch.full((BATCH, TARGET), SOURCE)), dim=1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for layer in list(model.sequential)[:-2]:
            hidden = layer(hidden, None, starts)
    row = 2 * SOURCE * SOURCE + 3 * TARGET * (SOURCE + TARGET)
    for module in (model.sequential[1:-2]).modules():
        assert not isinstance(module, nn.Linear)  # the hooks have seen every product
    forward = 2 * sum(products) + 4 * BATCH * row * 64
    assert plan.flops_per_iteration == 3 * forward

    for each in parameters:
        held.pop(each.untyped_storage().data_ptr(), None)
    saved = sum(each.untyped_storage().nbytes() for each in held.values())
    of_block, dims, layout = two_stack_activations(config), ModelDims.of(config.model), activation_layout(config)
    assert sum(of_block(dims, layout, block) for block in range(5)) == pytest.approx(saved, rel=0.08)
    assert f"2 encoder and 3 decoder blocks x {64}" in plan.text()
    assert f"{BATCH * (SOURCE + TARGET):,} tokens a step at sequence length 128 + 64" in plan.text()
