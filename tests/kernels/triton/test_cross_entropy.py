"""Triton's softmax over the vocabulary against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.kernels.cross_entropy import GradientSpec
from megatron.kernels.triton.cross_entropy import softmax_pass
from tests.kernels.triton.compared import COLUMNS, DTYPES, TOLERANCE, random


def spec_of(rows: Tensor, out: Tensor) -> GradientSpec:
    count, columns = rows.shape
    targets = torch.arange(count) * 7919 % columns
    scale = torch.linspace(0.5, 2.0, count)
    hit = scale.clone()
    hit[::2] = 0.0  # the target is on another rank
    return GradientSpec(targets, scale, hit, out)


def expected(rows: Tensor, spec: GradientSpec) -> tuple[Tensor, Tensor]:
    rows = rows.double()
    gradient = spec.scale.double()[:, None] * rows.softmax(-1)
    gradient[torch.arange(len(rows)), spec.targets] -= spec.hit.double()
    return rows.logsumexp(-1), gradient


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sums_and_gradients_are_those_of_float64(dtype: torch.dtype, columns: int) -> None:
    logits = 5.0 * random(4, columns, dtype=dtype)
    out = torch.empty_like(logits)
    sums, gradient = expected(logits, spec_of(logits, out))
    found = softmax_pass(logits, spec_of(logits, out))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), sums, rtol=1e-6, atol=1e-6)
    assert (out.double() - gradient).abs().max().item() < TOLERANCE[dtype] * max(1.0, gradient.abs().max().item())
    known = torch.empty_like(logits)
    softmax_pass(logits, spec_of(logits, known), log_sums=found)
    assert torch.equal(known, out)


def test_inplace_and_in_rows_that_are_longer_than_the_vocabulary() -> None:
    logits = 5.0 * random(3, 10_000, dtype=torch.float32)
    real = logits[:, :9_001]
    sums, gradient = expected(real, spec_of(real, real))
    padding = logits[:, 9_001:].clone()
    found = softmax_pass(real, spec_of(real, real))
    assert torch.allclose(found.double(), sums, rtol=1e-6)
    assert torch.allclose(real.double(), gradient, atol=1e-6)
    assert torch.equal(logits[:, 9_001:], padding)


def test_large_and_infinite_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, float("-inf")], [float("-inf"), 3.0, -2e4]])
    assert torch.allclose(softmax_pass(logits).double(), logits.double().logsumexp(-1))
    assert softmax_pass(torch.empty(0, 5)).shape == (0,)
