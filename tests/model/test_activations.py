"""Activations against their formulas in float64, and the order of a gated activation's halves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron.distributed.mesh import Topology
from megatron.distributed.param_init import ParamFactory
from megatron.model.mlp.activations import BoundedGate
from megatron.model.mlp.xielu import XIELU
from megatron.registry import ACTIVATIONS


def phi(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


PLAIN = {
    "gelu": lambda x: x * phi(x),
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "softsign": lambda x: x / (1 + x.abs()),
    "xielu": lambda x: torch.where(
        x > 0, 0.8 * x * x + 0.5 * x, 0.8 * (torch.exp(torch.minimum(x, torch.tensor(-1e-6))) - 1 - x) + 0.5 * x
    ),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
}
GATED = {
    "swiglu": PLAIN["silu"],
    "geglu": PLAIN["gelu"],
    "geglu_tanh": PLAIN["gelu_tanh"],
    "quick_geglu": PLAIN["quick_gelu"],
    "reglu": PLAIN["relu"],
    "glu": lambda x: 1 / (1 + torch.exp(-x)),
    "bilinear": lambda x: x,
}


def test_every_activation_is_here() -> None:
    assert set(ACTIVATIONS.names) == PLAIN.keys() | GATED.keys()
    assert {name for name in ACTIVATIONS.names if ACTIVATIONS.entry(name).gated} == set(GATED)


@pytest.mark.parametrize("name", ACTIVATIONS.names)
def test_values_and_gradients(name: str) -> None:
    x = torch.linspace(-4, 4, 240, dtype=torch.float64).view(20, 12).requires_grad_()
    if name in GATED:
        up, gate = x[:, :6], x[:, 6:]
        expected = up * GATED[name](gate)
    else:
        expected = PLAIN[name](x)
    weights = torch.rand(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), x)
    actual = ACTIVATIONS.load(name)(x)
    (actual_grad,) = torch.autograd.grad((actual * weights).sum(), x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_grad, expected_grad)


@pytest.mark.parametrize(("bound", "offset"), [(1.5, 0.0), (None, 1.0), (1.5, 1.0)])
def test_halves_are_bounded_and_shifted(bound: float | None, offset: float) -> None:
    """The activated half is bounded from above, the plain half on both sides, and then shifted."""
    x = torch.linspace(-4, 4, 240, dtype=torch.float64).view(20, 12).requires_grad_()
    up, gate = x[:, :6], x[:, 6:]
    if bound is not None:
        up, gate = up.clamp(-bound, bound), torch.where(gate > bound, bound, gate)
    expected = (up + offset) * GATED["quick_geglu"](gate)
    actual = BoundedGate(ACTIVATIONS.load("quick_geglu"), bound, offset)(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (actual, expected)))


def test_xielu_learns_its_factors() -> None:
    """Values and gradients, those of both factors too, by differences of the formula in float64."""
    module = XIELU(ParamFactory(1, 2, Topology.single().model, dtype=torch.float64))
    factors = [float(torch.nn.functional.softplus(each.detach())) for each in (module.alpha_p, module.alpha_n)]
    assert factors == pytest.approx([0.8, 0.3])
    with torch.no_grad():
        module.alpha_p.add_(0.3)
        module.alpha_n.sub_(0.4)
    x = torch.linspace(-3, 3, 40, dtype=torch.float64).view(2, 4, 5).requires_grad_()

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(("alpha_p", "alpha_n"), values, strict=True))
        found: torch.Tensor = torch.func.functional_call(module, named, (x,))
        return found

    assert torch.autograd.gradcheck(run, (x, module.alpha_p, module.alpha_n))
    above, below = torch.log1p(module.alpha_p.exp()), 0.5 + torch.log1p(module.alpha_n.exp())
    edge = torch.minimum(x, torch.tensor(-1e-6, dtype=torch.float64))
    expected = torch.where(x > 0, above * x**2 + 0.5 * x, below * (torch.exp(edge) - 1 - x) + 0.5 * x)
    torch.testing.assert_close(module(x), expected)
