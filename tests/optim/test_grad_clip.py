"""The gradient norm and clipping of one rank, beside torch's own in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from megatron.distributed.mesh import Topology
from megatron.optim.grad_clip import GradientClipper


def parameters(scale: float) -> list[Parameter]:
    generator = torch.Generator().manual_seed(3)
    made = [Parameter(torch.zeros(shape)) for shape in ((7, 5), (11,), (2, 3))]
    for parameter in made:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 100.0])
def test_it_clips_as_torch_does(scale: float) -> None:
    """Gradients below the largest norm stay as they are; others are scaled to it."""
    held = parameters(scale)
    expected = [parameter.grad.double().clone() for parameter in held]
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected))
    factor = min(1.0, 1.0 / (norm + 1e-6))
    clipper = GradientClipper(held, Topology.build(pipe=1, model=1, rank=0, world_size=1), max_norm=1.0)
    clipper.clip()
    assert float(clipper.norm) == pytest.approx(norm, rel=1e-6)
    assert clipper.factor == pytest.approx(factor, rel=1e-6)
    for parameter, gradient in zip(held, expected, strict=True):
        torch.testing.assert_close(parameter.grad.double(), gradient * factor, rtol=1e-6, atol=0)


def test_zero_never_scales() -> None:
    held = parameters(100.0)
    before = [parameter.grad.clone() for parameter in held]
    GradientClipper(held, Topology.build(pipe=1, model=1, rank=0, world_size=1), max_norm=0.0).clip()
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(held, before, strict=True))


def test_gradients_that_are_not_finite_are_dropped() -> None:
    held = parameters(1.0)
    held[1].grad[4] = math.inf
    clipper = GradientClipper(held, Topology.build(pipe=1, model=1, rank=0, world_size=1), max_norm=1.0)
    clipper.clip()
    assert clipper.skipped and all(parameter.grad is None for parameter in held)
