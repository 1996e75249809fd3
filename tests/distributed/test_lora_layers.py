"""Linear layers with norms of rows (DoRA) against `peft`'s layer: dropout, and an exact start in every precision."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from megatron.distributed.mesh import Topology
from megatron.distributed.param_init import ParamFactory
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.distributed.tensor_parallel.lora import LoraSpec

IN, OUT, RANK, ALPHA, DROPOUT = 24, 40, 4, 6, 0.3
Layer = type[ColumnParallelLinear] | type[RowParallelLinear]


def normal(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(generator=generator)


def ours(layer: Layer, dropout: float, dtype: torch.dtype) -> nn.Module:
    spec = LoraSpec(RANK, ALPHA / RANK, dropout, TensorParallelRNG(1, 0, torch.device("cpu")), magnitudes=True)
    source = ParamFactory(seed=3, layer=2, axis=Topology.single().model, dtype=dtype).of("part")
    return layer(IN, OUT, source, init_fn=normal, bias=True, lora=spec)


@pytest.mark.parametrize("layer", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
def test_outputs_and_gradients_are_those_of_peft(layer: Layer, dropout: float) -> None:
    """With the same dropout masks. Norms that no gradient ignores would fail here."""
    own = ours(layer, dropout, torch.float32)
    base = nn.Linear(IN, OUT)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, use_dora=True)
    reference = PeftLinear(base, "default", settings, r=RANK, lora_alpha=ALPHA).train()
    pairs = {
        "weight": (own.weight, base.weight),
        "bias": (own.bias, base.bias),
        "A": (own.lora_A.weight, reference.lora_A["default"].weight),
        "B": (own.lora_B.weight, reference.lora_B["default"].weight),
        "norms": (own.lora_magnitude_vector.weight, reference.lora_magnitude_vector["default"].weight),
    }
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for mine, theirs in pairs.values():
            mine.copy_(torch.randn(mine.shape, generator=draws))
            theirs.copy_(mine)
    inputs = [torch.randn(5, 2, IN, generator=torch.Generator().manual_seed(6)).requires_grad_() for _ in range(2)]
    outputs = []
    for module, x in zip((own, reference), inputs, strict=True):
        torch.manual_seed(7)
        outputs.append(module(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-3)
    for name in ("A", "B", "norms"):
        mine, theirs = (one.grad for one in pairs[name])
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layer", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_frozen_layer(layer: Layer, dtype: torch.dtype) -> None:
    """Bit by bit, a row of zeros too."""
    own = ours(layer, 0.0, dtype)
    own.weight.data[3] = 0
    factors = (own.weight, own.lora_A.weight, own.lora_B.weight)
    own.lora_magnitude_vector.start(*factors)
    expected = own.weight.detach().float().norm(dim=1)
    torch.testing.assert_close(own.lora_magnitude_vector.weight.float(), expected, rtol=2**-8, atol=0)
    factor = own.lora_magnitude_vector.factor(*factors)
    assert torch.equal(factor, torch.ones(OUT, dtype=dtype).index_fill_(0, torch.tensor([3]), 0))
