"""Triton's Newton-Schulz iterations against float64."""

from __future__ import annotations

import pytest
import torch

from megatron.kernels.newton_schulz import COEFFICIENTS
from megatron.kernels.triton.newton_schulz import orthogonalize, scaled_symmetric
from tests.kernels.triton.compared import DTYPES, TOLERANCE, random


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (1, 64, 32), (1, 65, 40), (2, 130, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_symmetric_products_are_those_of_float64(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x = random(*shape, dtype=dtype)
    other = random(shape[0], shape[1], shape[1], dtype=dtype, seed=1)
    other = (other + other.transpose(1, 2)) / 2
    product = x.double() @ x.double().transpose(1, 2)
    for found, expected in (
        (scaled_symmetric(x), product),
        (scaled_symmetric(x, 2.0, other, -0.5), 2 * product - 0.5 * other.double()),
        (scaled_symmetric(x.transpose(1, 2).contiguous().transpose(1, 2)), product),
    ):
        scale = max(1.0, expected.abs().max().item())
        assert (found.double() - expected).abs().max().item() < TOLERANCE[dtype] * scale
        apart = (
            found - found.transpose(1, 2)
        ).abs()  # a block on the diagonal is as symmetric as the product of the CPU
        assert apart.max().item() < TOLERANCE[dtype] * scale
        for start in range(0, shape[1], 64):
            assert torch.equal(apart[:, start + 64 :, start : start + 64].count_nonzero(), torch.tensor(0))


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64), (2, 30, 20)], ids=str)
def test_iterations_are_those_of_float64(shape: tuple[int, ...]) -> None:
    matrix = random(*shape, dtype=torch.float32)
    x = matrix.double()
    x = x if shape[-2] <= shape[-1] else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    expected = x if shape[-2] <= shape[-1] else x.mT
    assert torch.allclose(orthogonalize(matrix, [COEFFICIENTS] * 5).double(), expected, atol=1e-4)
    if shape[-2] == shape[-1]:  # a square matrix has singular values near 0, which rise slowly
        return
    values = torch.linalg.svdvals(orthogonalize(matrix, [COEFFICIENTS] * 5).double())
    assert values.min().item() > 0.5
    assert values.max().item() < 1.5
