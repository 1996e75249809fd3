"""Triton's kernels compiled for this GPU, against float64: values and all gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.cross_entropy import GradientSpec
from megatron.registry import ACTIVATIONS
from tests.kernels.triton.compared import DTYPES, TOLERANCE, random, worst

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
EPSILON = 1e-5


def on_device(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return random(*shape, dtype=dtype, seed=seed).to(DEVICE)


@pytest.mark.parametrize("columns", [127, 4096, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype: torch.dtype, columns: int) -> None:
    from megatron.kernels.triton import norms

    x, weight, bias = (on_device(64, columns, dtype=dtype), *(on_device(columns, dtype=dtype, seed=s) for s in (1, 2)))

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, EPSILON)

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, EPSILON)

    assert (
        worst(lambda x, w, b: norms.layer_norm(x, w, b, EPSILON), layer_norm, (x, weight, bias)) < 4 * TOLERANCE[dtype]
    )
    assert worst(lambda x, w: norms.rms_norm(x, w, EPSILON), rms_norm, (x, weight)) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "mish", "swiglu", "geglu", "bilinear"])
def test_activations(name: str, dtype: torch.dtype) -> None:
    from megatron.kernels.triton.activations import bias_activation

    formula: Callable[[Tensor], Tensor] = ACTIVATIONS.load(name)
    x, bias = on_device(64, 2048, dtype=dtype), on_device(2048, dtype=dtype, seed=1)
    assert (
        worst(lambda x, b: bias_activation(x, b, name), lambda x, b: formula(x + b), (x, bias)) < 4 * TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_and_permutation(dtype: torch.dtype) -> None:
    from megatron.kernels.rotary import rotary_pair as plain
    from megatron.kernels.triton.permute import combine, inverse_of
    from megatron.kernels.triton.rotary import rotary_pair

    angles = torch.outer(torch.arange(128.0), 100.0 ** -torch.arange(0, 1, 1 / 16)).to(DEVICE)
    q, k = on_device(2, 8, 64, 64, dtype=dtype), on_device(2, 2, 64, 64, dtype=dtype, seed=1)
    cos, sin = angles.cos(), angles.sin()
    difference = worst(lambda q, k: rotary_pair(q, k, cos, sin, 5), lambda q, k: plain(q, k, cos, sin, 5), (q, k))
    assert difference < 4 * TOLERANCE[dtype]
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0)).to(DEVICE)[:120]
    inverse = inverse_of(order, 128)
    rows, weights = on_device(120, 256, dtype=dtype), on_device(64, 2, dtype=dtype, seed=1)

    def reference(rows: Tensor, weights: Tensor) -> Tensor:
        full = rows.new_zeros(128, 256).index_copy(0, order, rows)
        return (full.view(64, 2, 256) * weights.unsqueeze(-1)).sum(1)

    assert worst(lambda r, w: combine(r, w, order, inverse), reference, (rows, weights)) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_softmax_over_the_vocabulary(dtype: torch.dtype) -> None:
    from megatron.kernels.triton.cross_entropy import softmax_pass

    logits = 5.0 * on_device(64, 50257, dtype=dtype)
    out, scale = torch.empty_like(logits), torch.ones(64, device=DEVICE)
    targets = torch.arange(64, device=DEVICE) * 781
    sums = softmax_pass(logits, GradientSpec(targets, scale, scale, out))
    gradient = logits.double().softmax(-1)
    gradient[torch.arange(64), targets] -= 1.0
    assert torch.allclose(sums.double(), logits.double().logsumexp(-1), rtol=1e-6)
    assert (out.double() - gradient).abs().max().item() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_symmetric_products(dtype: torch.dtype) -> None:
    from megatron.kernels.triton.newton_schulz import scaled_symmetric

    x = on_device(2, 300, 520, dtype=dtype)
    product = x.double() @ x.double().mT
    found = scaled_symmetric(x).double()
    assert (found - product).abs().max().item() < 4 * TOLERANCE[dtype] * product.abs().max().item()
    assert torch.equal(found, found.mT)


def test_dropout_draws_the_same_mask_in_the_backward_pass() -> None:
    from megatron.kernels.triton.dropout_add import bias_dropout_add

    x = torch.ones(512, 1000, device=DEVICE, requires_grad=True)
    y = bias_dropout_add(x, None, torch.zeros_like(x), 0.25, torch.tensor([7], device=DEVICE))
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y)
    assert abs((y == 0).double().mean().item() - 0.25) < 0.01
