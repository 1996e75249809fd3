"""The compiled root mean square norm against float64, alone and of a residual sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.kernels import norms
from megatron.kernels.cpp_norms import cpp_norm_unavailable, cpp_rms_norm
from megatron.kernels.norms import RMS_NORM

DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
EPSILON = 1e-5


def tensors(width: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    """A scale [h], and others [37, 2, h]."""
    generator = torch.Generator().manual_seed(width)
    scale = (1 + 0.3 * torch.randn(width, generator=generator)).to(dtype)
    return [scale, *(torch.randn(37, 2, width, generator=generator).to(dtype) for _ in range(count))]


def formula(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 16, 127, 1000])
def test_values_and_gradients_are_those_of_float64(width: int, dtype: torch.dtype) -> None:
    scale, x, dy = tensors(width, dtype, 2)
    assert cpp_norm_unavailable(x, scale) is None
    given = [x.requires_grad_(), scale.requires_grad_()]
    y = RMS_NORM(x, scale, EPSILON)
    exact = [each.detach().double().requires_grad_() for each in given]
    expected = formula(*exact)
    assert torch.allclose(y.double(), expected, rtol=2 * ROUNDING[dtype], atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(y, given, dy), torch.autograd.grad(expected, exact, dy.double()), strict=True
    ):
        assert torch.allclose(one.double(), other, rtol=2 * ROUNDING[dtype], atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("uses", ["both", "norm", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_of_a_sum(dtype: torch.dtype, uses: str) -> None:
    scale, x, residual, dy, dtotal = tensors(100, dtype, 4)
    given = [each.requires_grad_() for each in (x, residual, scale)]
    y, total = RMS_NORM.of_sum(x, residual, scale, EPSILON)
    assert torch.equal(total, residual + x)
    exact = [each.detach().double().requires_grad_() for each in given]
    wide = exact[0] + exact[1]
    wide = wide + (total.double() - wide).detach()  # the sum as it was rounded
    pairs = [(y, formula(wide, exact[2]), dy), (total, wide, dtotal)]
    pairs = {"both": pairs, "norm": pairs[:1], "sum": pairs[1:]}[uses]
    mine = torch.autograd.grad([one for one, _, _ in pairs], given, [grad for *_, grad in pairs], allow_unused=True)
    theirs = torch.autograd.grad(
        [one for _, one, _ in pairs], exact, [grad.double() for *_, grad in pairs], allow_unused=True
    )
    for one, other in zip(mine, theirs, strict=True):
        if other is None:
            assert one is None or not one.any()
        else:
            assert torch.allclose(one.double(), other, rtol=2 * ROUNDING[dtype], atol=2e-5 * float(other.abs().max()))


def test_what_is_no_number_stays_in_its_row() -> None:
    scale, x = tensors(40, torch.float32, 1)
    x[5, 1, 7] = float("nan")
    missing = cpp_rms_norm(x, scale, EPSILON).isnan()
    assert missing[5, 1].all() and missing.sum() == 40


def test_threads_change_no_bit() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scale, x, dy = tensors(64, torch.float32, 2)
            y = RMS_NORM(x.requires_grad_(), scale.requires_grad_(), EPSILON)
            found.append((y.detach(), *torch.autograd.grad(y, (x, scale), dy)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_others_are_computed_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    scale, x, residual = tensors(24, torch.float32, 2)
    y, total = RMS_NORM.of_sum(x, residual, scale, EPSILON)
    monkeypatch.setattr(norms, "cpp_norm_unavailable", lambda x, scale: "for this test")
    torch.testing.assert_close(RMS_NORM.of_sum(x, residual, scale, EPSILON), (y, total))
    assert "is for fp32" in str(cpp_norm_unavailable(x.double(), scale))
    assert "a scale of the type" in str(cpp_norm_unavailable(x.bfloat16(), scale))
