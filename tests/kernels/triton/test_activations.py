"""Triton's activations against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.kernels.triton.activations import GATED, PLAIN, bias_activation
from megatron.registry import ACTIVATIONS
from tests.kernels.triton.compared import COLUMNS, DTYPES, TOLERANCE, random, worst


def formula_of(name: str) -> Callable[[Tensor], Tensor]:
    return ACTIVATIONS.load(name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*PLAIN, *GATED])
def test_activations_are_those_of_float64(name: str, dtype: torch.dtype) -> None:
    formula = formula_of(name)
    tolerance = 3 * TOLERANCE[dtype]
    for columns in COLUMNS[:4]:
        width = columns * (2 if name in GATED else 1)
        x, bias = 3.0 * random(4, width, dtype=dtype), random(width, dtype=dtype, seed=1)
        assert worst(lambda x, b: bias_activation(x, b, name), lambda x, b: formula(x + b), (x, bias)) < tolerance
        assert worst(lambda x: bias_activation(x, None, name), formula, (x,)) < tolerance


def test_every_activation_of_the_registry_but_the_latest_has_a_kernel() -> None:
    assert {*PLAIN, *GATED} == set(ACTIVATIONS.names) - {"quick_gelu", "quick_geglu", "xielu"}


def test_strided_inputs_wide_rows_and_no_rows() -> None:
    formula = formula_of("swiglu")

    def kernel(x: Tensor) -> Tensor:
        return bias_activation(x, None, "swiglu")

    assert worst(kernel, formula, (random(3, 2, 14, dtype=torch.float32).transpose(0, 1),)) < 2e-6
    assert worst(kernel, formula, (random(1, 100514, dtype=torch.float32),)) < 2e-6
    assert kernel(torch.empty(0, 6)).shape == (0, 3)


@pytest.mark.parametrize("name", ["gelu_tanh", "mish", "silu", "gelu", "swiglu"])
def test_large_inputs_stay_finite(name: str) -> None:
    x = torch.tensor([[-1e4, -90.0, 90.0, 1e4]])
    assert worst(lambda x: bias_activation(x, None, name), formula_of(name), (x,)) < 2e-6
