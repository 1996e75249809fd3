"""Triton's norms against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.triton import norms
from tests.kernels.triton.compared import COLUMNS, DTYPES, TOLERANCE, random, worst

EPSILON = 1e-5


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPSILON)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPSILON)


def rounded_sum(x: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum with its value rounded to the type and the gradient of the sum."""
    total = x + residual
    return total + (total.detach().to(dtype).double() - total.detach())


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_those_of_float64(dtype: torch.dtype, columns: int) -> None:
    x = 3.0 * random(5, columns, dtype=dtype) + 1.0
    weight, bias = 1.0 + 0.1 * random(columns, dtype=dtype, seed=1), random(columns, dtype=dtype, seed=2)
    tolerance = 2 * TOLERANCE[dtype]
    assert worst(lambda x, w, b: norms.layer_norm(x, w, b, EPSILON), layer_norm, (x, weight, bias)) < tolerance
    assert worst(lambda x, w: norms.rms_norm(x, w, EPSILON), rms_norm, (x, weight)) < tolerance


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_a_residual_sum_are_those_of_float64(dtype: torch.dtype, columns: int) -> None:
    x, residual = random(3, columns, dtype=dtype), random(3, columns, dtype=dtype, seed=3)
    weight, bias = 1.0 + 0.1 * random(columns, dtype=dtype, seed=1), random(columns, dtype=dtype, seed=2)

    def with_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = rounded_sum(x, residual, dtype)
        return layer_norm(total, weight, bias), total

    def with_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = rounded_sum(x, residual, dtype)
        return rms_norm(total, weight), total

    tolerance = 2 * TOLERANCE[dtype]
    given = (x, residual, weight, bias)
    assert worst(lambda x, r, w, b: norms.add_layer_norm(x, r, w, b, EPSILON), with_layer_norm, given) < tolerance
    assert worst(lambda x, r, w: norms.add_rms_norm(x, r, w, EPSILON), with_rms_norm, given[:3]) < tolerance


def test_without_weight_or_bias_and_in_strided_layouts() -> None:
    x = random(4, 6, 2, 10, dtype=torch.float32).permute(2, 0, 1, 3)
    weight = torch.ones(10)

    def reference(x: Tensor) -> Tensor:
        return F.layer_norm(x, (10,))

    assert not x.is_contiguous()
    assert worst(lambda x: norms.layer_norm(x, None, None, EPSILON), reference, (x,)) < TOLERANCE[torch.float32]
    columns = random(10, 7, dtype=torch.float32).t()
    given = (columns, weight)
    assert worst(lambda x, w: norms.rms_norm(x, w, EPSILON), rms_norm, given) < TOLERANCE[torch.float32]


def test_no_rows_give_no_values_and_gradients_of_zeros() -> None:
    x, weight = torch.randn(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    y = norms.rms_norm(x, weight, EPSILON)
    y.sum().backward()
    assert y.shape == (0, 8)
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0] * 8
