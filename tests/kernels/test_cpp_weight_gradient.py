"""The compiled gradient of a linear layer's weight, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.kernels import linear
from megatron.kernels.cpp_weight_gradient import cpp_weight_gradient, cpp_weight_gradient_unavailable
from megatron.kernels.linear import onednn_linear

DTYPES = (torch.float32, torch.bfloat16)


def case(rows: int, out: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An output gradient [r, out] and an input [r, in], both views of wider rows."""
    generator = torch.Generator().manual_seed(rows + out)
    wide = (torch.randn(rows, columns + 5, generator=generator).to(dtype) for columns in (out, width))
    grad, x = (each[:, 2:-3] for each in wide)
    assert cpp_weight_gradient_unavailable(grad, x) is None
    return grad, x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "out", "width"),
    [(1, 1, 1), (3, 8, 32), (127, 13, 35), (1024, 64, 64), (1025, 24, 33), (2050, 9, 100), (64, 1000, 16)],
)
def test_the_product_is_that_of_float64(rows: int, out: int, width: int, dtype: torch.dtype) -> None:
    grad, x = case(rows, out, width, dtype)
    expected = grad.double().t() @ x.double()
    tolerance = 4e-7 * rows**0.5 * float(expected.abs().max())
    found = cpp_weight_gradient(grad, x)
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert float((found.double() - expected).abs().max()) < tolerance
    assert cpp_weight_gradient(grad, x, found) is found
    assert float((found.double() - 2 * expected).abs().max()) < 2 * tolerance


def test_no_rows_give_nothing() -> None:
    grad, x = torch.zeros(0, 3), torch.zeros(0, 4)
    assert torch.equal(cpp_weight_gradient(grad, x), torch.zeros(3, 4))
    assert torch.equal(cpp_weight_gradient(grad, x, torch.ones(3, 4)), torch.ones(3, 4))


def test_threads_change_no_bit() -> None:
    grad, x = case(1500, 70, 130, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cpp_weight_gradient(grad, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])


def test_what_is_no_number_stays_in_its_row_and_column() -> None:
    grad, x = case(40, 20, 40, torch.float32)
    grad[7, 3], x[9, 11] = float("nan"), float("inf")
    found = cpp_weight_gradient(grad, x)
    expected = torch.zeros(20, 40, dtype=torch.bool)
    expected[3], expected[:, 11] = True, True
    assert torch.equal(~found.isfinite(), expected)


def test_linear_layers_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(6, 5), torch.randn(4, 5, requires_grad=True)
    monkeypatch.setattr(linear, "cpp_weight_gradient", lambda grad, x: torch.full((4, 5), 7.0))
    onednn_linear(x, weight, None).square().sum().backward()
    assert weight.grad is not None and bool((weight.grad == 7).all())


@pytest.mark.parametrize(
    ("grad", "x", "reason"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3), "is for fp32 and bfloat16 on the CPU"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16), "tensors of one type"),
        (torch.zeros(3, 2).t(), torch.zeros(2, 3), "rows of neighbouring numbers"),
    ],
    ids=["float64", "types", "transposed"],
)
def test_what_it_cannot_take_is_named(grad: Tensor, x: Tensor, reason: str) -> None:
    assert reason in str(cpp_weight_gradient_unavailable(grad, x))
