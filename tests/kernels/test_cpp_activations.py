"""The compiled gated activations against their formulas in float64, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron.kernels import activations
from megatron.kernels.activations import activation_of
from megatron.kernels.cpp_activations import GATED, cpp_activation, cpp_activation_unavailable
from megatron.registry import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}


def gradients(function, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of an activation."""
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 16, 127, 1500])
@pytest.mark.parametrize("name", GATED)
def test_values_and_gradients_are_those_of_float64(name: str, width: int, dtype: torch.dtype) -> None:
    formula = ACTIVATIONS.load(name)
    generator = torch.Generator().manual_seed(width)
    x = (3 * torch.randn(2, 5, 2 * width, generator=generator)).to(dtype)
    dy = torch.randn(2, 5, width, generator=generator).to(dtype)
    assert cpp_activation_unavailable(x) is None
    found = gradients(activation_of(name, formula), x, dy)
    expected = gradients(formula, x.double(), dy.double())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and one.is_contiguous()
        torch.testing.assert_close(one.double(), other, rtol=2e-6 + ROUNDING[dtype], atol=1e-6)


def test_the_tails_of_gelu_are_exact_relatively() -> None:
    gate = torch.tensor([-9.0, -5.0, -3.0, -1e-3, 0.0, 1e-20, 4.0, 30.0])
    expected = gate.double() * 0.5 * torch.special.erfc(-gate.double() / math.sqrt(2))
    found = cpp_activation(torch.cat((torch.ones(8), gate)), "geglu")
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("name", GATED)
def test_large_and_missing_numbers(name: str) -> None:
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4, float("nan")])
    x, ones = torch.cat((torch.ones(5), gate)), torch.ones(5)
    formula = ACTIVATIONS.load(name)
    expected = gradients(formula, x.double(), ones.double())
    for one, other in zip(gradients(activation_of(name, formula), x, ones), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-30, equal_nan=True)


def test_strided_inputs_and_gradients() -> None:
    x, dy, formula = torch.randn(6, 40).t(), torch.randn(3, 40).t(), ACTIVATIONS.load("swiglu")
    found, expected = (gradients(function, x, dy) for function in (activation_of("swiglu", formula), formula))
    torch.testing.assert_close(found, expected)


def test_other_activations_and_types_have_their_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    def formula(x: Tensor) -> Tensor:
        return x + 1

    assert activation_of("mish", formula) is formula
    ones = torch.ones(3, dtype=torch.float64)
    assert torch.equal(activation_of("glu", formula)(ones), ones + 1)
    monkeypatch.setattr(activations, "cpp_activation_unavailable", lambda x: "for this test")
    assert torch.equal(activation_of("glu", formula)(torch.ones(3)), torch.full((3,), 2.0))


def test_threads_change_no_bit() -> None:
    x = torch.randn(100, 1000)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cpp_activation(x, "geglu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])
