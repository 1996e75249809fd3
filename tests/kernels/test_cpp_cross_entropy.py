"""The compiled softmax over a vocabulary, against float64 and beside torch's blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.kernels import cross_entropy
from megatron.kernels.cpp_cross_entropy import cpp_softmax, cpp_softmax_unavailable
from megatron.kernels.cross_entropy import GradientSpec, softmax_pass

ROWS = 5
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}


def case(columns: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, GradientSpec]:
    """Logits [r, v], a view of wider rows, and the terms of a gradient in a tensor of its own."""
    generator = torch.Generator().manual_seed(columns)
    logits = (spread * torch.randn(ROWS, columns + 3, generator=generator)).to(dtype)[:, :columns]
    targets = torch.randint(columns, (ROWS,), generator=generator)
    scale, hit = torch.rand(2, ROWS, generator=generator)
    return logits, GradientSpec(targets, scale, hit, torch.zeros(ROWS, columns + 1, dtype=dtype)[:, :columns])


def expected(logits: Tensor, spec: GradientSpec) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and gradient in float64."""
    wide = logits.double()
    gradient = spec.scale.double().unsqueeze(1) * wide.softmax(1)
    gradient[torch.arange(ROWS), spec.targets] -= spec.hit.double()
    return wide.logsumexp(1), gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 3, 16, 127, 1000, 50257])
def test_sums_and_gradients_are_those_of_float64(columns: int, dtype: torch.dtype) -> None:
    logits, spec = case(columns, dtype)
    assert cpp_softmax_unavailable(logits) is None
    sums, gradient = expected(logits, spec)
    assert torch.allclose(cpp_softmax(logits).double(), sums, rtol=0, atol=3e-6)
    assert torch.allclose(softmax_pass(logits, spec).double(), sums, rtol=0, atol=3e-6)
    assert torch.allclose(spec.out.double(), gradient, rtol=2e-6 + ROUNDING[dtype], atol=1e-7)
    known = GradientSpec(spec.targets, spec.scale, spec.hit, torch.zeros_like(spec.out))
    assert torch.equal(softmax_pass(logits, known, sums.float()), sums.float())
    assert torch.allclose(known.out.double(), gradient, rtol=3e-6 + ROUNDING[dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_may_be_overwritten(dtype: torch.dtype) -> None:
    logits, spec = case(1000, dtype)
    softmax_pass(logits, spec)
    same = logits.clone()
    softmax_pass(same, GradientSpec(spec.targets, spec.scale, spec.hit, same))
    assert torch.equal(same, spec.out)


def test_far_and_missing_logits_get_nothing() -> None:
    logits, spec = case(100, torch.float32, spread=60.0)
    logits[:, 7] = float("-inf")
    spec.targets.fill_(3)
    sums, gradient = expected(logits, spec)
    assert torch.allclose(softmax_pass(logits, spec).double(), sums, rtol=1e-6)
    assert torch.allclose(spec.out.double(), gradient, rtol=1e-5, atol=1e-7) and not spec.out[:, 7].any()


@pytest.mark.parametrize("columns", [40, 5])
def test_a_row_that_holds_no_number_gives_none(columns: int) -> None:
    logits, spec = case(columns, torch.float32)
    logits[2, columns - 1] = float("nan")
    sums = softmax_pass(logits, spec)
    assert sums.isnan().tolist() == [False, False, True, False, False]
    assert spec.out.isnan().all(1).tolist() == [False, False, True, False, False]


def test_threads_change_no_bit() -> None:
    logits, spec = case(50257, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((softmax_pass(logits, spec), spec.out.clone()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(pair, found[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_computes_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, spec = case(1000, dtype)
    sums, gradient = softmax_pass(logits, spec), spec.out.clone()
    monkeypatch.setattr(cross_entropy, "cpp_softmax_unavailable", lambda rows: "for this test")
    assert torch.allclose(softmax_pass(logits, spec), sums, atol=3e-6)
    assert torch.allclose(spec.out.double(), gradient.double(), rtol=2e-6 + 2 * ROUNDING[dtype], atol=1e-7)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "is for fp32 and bfloat16 on the CPU"),
        (torch.zeros(3, 2).t(), "rows of neighbouring numbers"),
        (torch.zeros(2, 0), "rows of neighbouring numbers"),
    ],
    ids=["float64", "transposed", "empty"],
)
def test_what_it_cannot_take_is_named(rows: Tensor, reason: str) -> None:
    assert reason in str(cpp_softmax_unavailable(rows))
