"""Triton's bias, dropout and residual sum against float64, and its random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.kernels.triton.dropout_add import bias_dropout_add
from tests.kernels.triton.compared import COLUMNS, DTYPES, TOLERANCE, random, worst

SEED = torch.tensor([1234])


def mask(shape: torch.Size, probability: float) -> Tensor:
    """The kernel's own mask and scale: what it makes of ones."""
    return bias_dropout_add(torch.ones(shape), None, torch.zeros(shape), probability, SEED)


@pytest.mark.parametrize("columns", COLUMNS[:4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_backward_pass_draws_the_same_mask(dtype: torch.dtype, columns: int) -> None:
    x, bias, residual = (random(3, columns, dtype=dtype), random(columns, dtype=dtype), random(3, columns, dtype=dtype))
    factor = mask(x.shape, 0.25).double()

    def kernel(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return bias_dropout_add(x, bias, residual, 0.25, SEED)

    def reference(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return residual + factor * (x + bias)

    assert worst(kernel, reference, (x, bias, residual)) < 2 * TOLERANCE[dtype]
    assert worst(lambda x, r: kernel(x, None, r), lambda x, r: reference(x, 0, r), (x, residual)) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_the_mask_drops_the_probability_and_scales_the_rest(probability: float) -> None:
    factor = mask(torch.Size((400, 250)), probability)
    used = factor != 0
    assert torch.allclose(factor[used], torch.tensor(1 / (1 - probability)))
    spread = (probability * (1 - probability) / factor.numel()) ** 0.5
    assert abs((~used).double().mean().item() - probability) < 5 * spread
    assert abs((~used).double().mean(0).var().item() / (probability * (1 - probability) / 400) - 1) < 0.5


def test_without_dropout_it_is_the_sum_and_a_seed_is_drawn_from_the_generator() -> None:
    x, residual = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(bias_dropout_add(x, None, residual, 0.0), x + residual)
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        drawn.append(bias_dropout_add(x, None, residual, 0.5))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], bias_dropout_add(x, None, residual, 0.5))
