"""Newton-Schulz iterations on a CPU: in bfloat16 against torch's Muon, in fp32 against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from megatron.distributed.mesh import Topology
from megatron.kernels import cpu_newton_schulz
from megatron.kernels.cpu_newton_schulz import bf16_orthogonalize, cpu_iterations, fp32_orthogonalize
from megatron.kernels.newton_schulz import POLAR_EXPRESS, STANDARD, coefficients
from megatron.optim import muon
from megatron.optim.builder_args import OptimizerArgs
from megatron.optim.param_groups import parameter_groups
from tests.optim.test_muon_options import in_float64

ROUNDED = 0.004
"""Relative difference to float64: the result is bfloat16, which rounds by up to 0.2 %."""


def step_of_torch(gradient: torch.Tensor) -> torch.Tensor:
    """The step of torch's Muon without momentum and decay, at rate 1 and its original scale."""
    weight = Parameter(torch.zeros_like(gradient))
    weight.grad = gradient
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="original").step()
    return -weight.detach() / max(1.0, gradient.shape[0] / gradient.shape[1]) ** 0.5


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 9), (40, 90), (90, 40), (256, 256), (257, 300), (300, 257), (520, 1100), (700, 390)], ids=str
)
def test_iterations_in_bfloat16_are_those_of_torch(shape: tuple[int, int]) -> None:
    """Blocks may be summed in another order than whole matrices, which moves a rounding here and there."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found, expected = bf16_orthogonalize(matrix, coefficients(STANDARD, 5)), step_of_torch(matrix)
    assert found.dtype == torch.bfloat16 and found.is_contiguous()
    assert (found - expected).abs().max() <= 2**-6 * expected.abs().max()
    assert (found - expected).norm() <= 2**-10 * expected.norm()


def test_matrices_of_a_stack_are_orthogonalized_apart() -> None:
    stack = torch.randn(2, 3, 300, 270, generator=torch.Generator().manual_seed(3))
    found = bf16_orthogonalize(stack, coefficients(POLAR_EXPRESS, 5))
    for at in ((0, 0), (1, 2)):
        assert torch.equal(found[at], bf16_orthogonalize(stack[at], coefficients(POLAR_EXPRESS, 5)))


@pytest.mark.parametrize("name", [STANDARD, POLAR_EXPRESS])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 9), (40, 90), (90, 40), (64, 64), (2, 30, 20), (150, 400), (300, 130)], ids=str
)
def test_iterations_are_those_of_float64(name: str, shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    found, expected = fp32_orthogonalize(matrix, coefficients(name, 5)), in_float64(matrix, coefficients(name, 5))
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < ROUNDED * expected.norm()


@pytest.mark.parametrize("shape", [(128, 128), (128, 512)], ids=str)
def test_small_singular_values_are_those_of_float64(shape: tuple[int, int]) -> None:
    """Eight directions are 10,000 times the others, as in momenta of real training."""
    draws = torch.Generator().manual_seed(5)
    left, right = (torch.randn(size, generator=draws) for size in ((shape[0], 8), (8, shape[1])))
    matrix = (left @ right + 1e-4 * torch.randn(shape, generator=draws)).bfloat16()
    found, expected = (do(matrix, coefficients(STANDARD, 5)) for do in (fp32_orthogonalize, in_float64))
    assert (found.double() - expected).norm() < ROUNDED * expected.norm()


def test_no_gradient_gives_no_step() -> None:
    assert not fp32_orthogonalize(torch.zeros(4, 9), coefficients(STANDARD, 5)).any()


@pytest.mark.parametrize("lacks", [True, False])
def test_a_cpu_without_bfloat16_takes_them(monkeypatch: pytest.MonkeyPatch, lacks: bool) -> None:
    monkeypatch.setattr(cpu_newton_schulz, "needs_fp32_matmul", lambda *_: lacks)
    assert cpu_iterations(torch.device("cpu")) is (fp32_orthogonalize if lacks else bf16_orthogonalize)
    assert cpu_iterations(torch.device("cuda")) is None
    weight = Parameter(torch.zeros(8, 24))
    weight.grad = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    args = OptimizerArgs(1.0, Topology.single(), {"momentum": 0.0, "nesterov": False, "adjust_lr_fn": "original"})
    muon.build(parameter_groups([weight], 0.0), args).step()
    error = -weight.detach().double() - in_float64(weight.grad, coefficients(STANDARD, 5))
    assert (error.norm() < ROUNDED * weight.norm()) == lacks
