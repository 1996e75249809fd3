"""The rotary kernel and the norms against their plain twins and float64, forward and backward."""

from __future__ import annotations

import cmath

import pytest
import torch

from megatron.kernels import rotary as rotary_module
from megatron.kernels.norms import plain_rms_norm, rms_norm
from megatron.kernels.rotary import plain_rotary, rotary
from megatron.model.positions.rope_frequencies import frequencies
from megatron.model.positions.rotary import Rotary
from tests.model.sections import model_section


@pytest.mark.parametrize("kernel", [rotary, plain_rotary])
def test_rotary_is_a_complex_rotation(kernel: object) -> None:
    """Feature i and feature i + r/2 are the real and imaginary part of a number times exp(j p base^(-2i/r))."""
    turned, base, offset = 6, 100.0, 3
    x = torch.randn(2, 3, 5, 10, generator=torch.Generator().manual_seed(0))
    actual = Rotary(frequencies(turned, base), 1.0, kernel)(x, offset)  # type: ignore[arg-type]
    for position in range(5):
        for pair in range(turned // 2):
            angle = (position + offset) * base ** (-2 * pair / turned)
            number = torch.complex(x[:, :, position, pair], x[:, :, position, pair + 3]) * cmath.exp(1j * angle)
            torch.testing.assert_close(actual[:, :, position, pair], number.real, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(actual[:, :, position, pair + 3], number.imag, rtol=1e-5, atol=1e-5)
    assert torch.equal(actual[..., turned:], x[..., turned:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_rotary_equals_its_plain_twin(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 2, 3, 16, generator=generator).permute(1, 2, 0, 3).to(dtype).requires_grad_()
    grad = torch.randn(2, 3, 9, 16, generator=generator).to(dtype)
    cos, sin = Rotary(frequencies(8, 10000)).table(9, torch.device("cpu"))
    cos, sin = cos[:9], sin[:9]
    fast, plain = rotary(x, cos, sin), plain_rotary(x, cos, sin)
    torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)
    (fast_grad,), (plain_grad,) = torch.autograd.grad(fast, x, grad), torch.autograd.grad(plain, x, grad)
    torch.testing.assert_close(fast_grad, plain_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("by_sequence", [False, True])
@pytest.mark.parametrize("compiled", [True, False])
def test_rotary_and_its_inverse_are_those_of_float64(
    compiled: bool, by_sequence: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled pass, and torch's operations where there is no compiler; strided inputs, a rest that stays."""
    if not compiled:
        monkeypatch.setattr(rotary_module, "library", lambda: "no compiler")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 2, 9, 20, generator=generator).to(dtype).permute(1, 2, 0, 3)[:, 3:6].requires_grad_()
    grad = torch.randn(2, 7, 3, 20, generator=generator).to(dtype).transpose(1, 2)
    angles = torch.randn(2, 1, 7, 8, generator=generator) if by_sequence else torch.randn(7, 8, generator=generator)
    assert (rotary_module._library(x) is not None) == compiled
    exact = x.detach().double().requires_grad_()
    first, second = exact[..., :8], exact[..., 8:16]
    cos, sin = angles.double().cos(), angles.double().sin()
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin, exact[..., 16:]), -1)
    found = rotary(x, angles.cos(), angles.sin())
    assert found.dtype == dtype and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    (got,), (right,) = torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, exact, grad.double())
    torch.testing.assert_close(got.double(), right, rtol=tolerance, atol=tolerance)


def test_a_longer_sequence_extends_the_table() -> None:
    positions = Rotary(frequencies(8, 10000))
    short = positions(torch.ones(1, 1, 4, 8), 0)
    long = positions(torch.ones(1, 1, 200, 8), 0)
    assert torch.equal(long[:, :, :4], short)
    assert torch.equal(positions(torch.ones(1, 1, 1, 8), 150)[0, 0, 0], long[0, 0, 150])


@pytest.mark.parametrize("turned", [0, 3])
def test_rotary_turns_pairs(turned: int) -> None:
    with pytest.raises(ValueError, match="pairs"):
        Rotary.for_attention(model_section(rotary_pct=turned / 8), 8, rotary)


@pytest.mark.parametrize("kernel", [rms_norm, plain_rms_norm])
def test_rms_norm(kernel: object) -> None:
    x = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64).mul_(4).requires_grad_()
    scale = torch.linspace(0.5, 2, 32, dtype=torch.float64, requires_grad=True)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * scale
    expected_grads = torch.autograd.grad(expected.pow(2).sum(), (x, scale))
    single = (x.detach().float().requires_grad_(), scale.detach().float().requires_grad_())
    actual = kernel(*single, 1e-3)  # type: ignore[operator]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(torch.autograd.grad(actual.pow(2).sum(), single), expected_grads, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
