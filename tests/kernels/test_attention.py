"""Every attention kernel against the formula in float64, forward and backward; nothing of the future leaks."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from megatron.kernels import blocked_attention as blocked
from megatron.kernels.attention import (
    any_attention,
    cpu_attention,
    gpu_attention,
    plain_attention,
    sdpa_attention,
)

KERNELS = {"plain": plain_attention, "sdpa": sdpa_attention, "cpu": cpu_attention}
# batch, query heads, key/value heads, queries, keys, head dim
SHAPES = [
    (2, 4, 4, 48, 48, 16),
    (1, 2, 2, 300, 300, 32),
    (2, 6, 2, 150, 150, 8),
    (2, 4, 1, 1, 9, 16),
    (1, 4, 2, 5, 12, 8),
]


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Written with explicit loops over queries, in float64."""
    group, late = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        keys, values = k[:, head // group], v[:, head // group]
        for query in range(q.shape[2]):
            seen = slice(0, late + query + 1)
            scores = torch.einsum("bd,bkd->bk", q[:, head, query], keys[:, seen]) / math.sqrt(q.shape[-1])
            out[:, head, query] = torch.einsum("bk,bkd->bd", scores.softmax(-1), values[:, seen])
    return out


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v as strided views of one [s, b, n, d] tensor each, as the model has them, and an output gradient."""
    batch, heads, kv_heads, queries, keys, size = shape
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(length, batch, count, size, generator=generator, dtype=torch.float64).to(dtype).permute(1, 2, 0, 3)
        for length, count in ((queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads))
    ]
    return (*(part.requires_grad_() for part in made[:3]), made[3])


@functools.cache
def expected_of(shape: tuple[int, ...], *rows: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The formula's values and gradients, computed once for all kernels; rows: lengths of each sequence's documents,
    each of which is cut out and put through the formula by itself.
    """
    *exact, grad = inputs(shape, torch.float64)
    parts = [
        torch.cat([formula(*part) for part in zip(*(x[i : i + 1].split(row, 2) for x in exact), strict=True)], 2)
        for i, row in enumerate(rows)
    ]
    expected = torch.cat(parts) if rows else formula(*exact)
    return expected.detach(), *torch.autograd.grad(expected, exact, grad)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_formula(name: str, shape: tuple[int, ...]) -> None:
    expected, *expected_grads = expected_of(shape)
    *single, grad = inputs(shape, torch.float32)
    actual = KERNELS[name](*single, 0.0)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(torch.autograd.grad(actual, single, grad), expected_grads, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "cpu"])
def test_bf16_stays_near_the_formula(name: str) -> None:
    """bf16 keeps 8 bits: 2 % of the largest value covers scores, weights and outputs rounded to it."""
    shape = (2, 4, 2, 200, 200, 32)
    expected, *expected_grads = expected_of(shape)
    *short, grad = inputs(shape, torch.bfloat16)
    actual = KERNELS[name](*short, 0.0)
    for got, want in zip((actual, *torch.autograd.grad(actual, short, grad)), (expected, *expected_grads), strict=True):
        assert (got.double() - want).abs().max() < 0.02 * want.abs().max()


def test_weights_computed_again_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    *parts, grad = inputs((2, 4, 2, 300, 300, 16), torch.float32)
    retained = torch.autograd.grad(blocked.blocked_attention(*parts), parts, grad)
    monkeypatch.setattr(blocked, "MAX_SAVED_BYTES", 0)
    again = torch.autograd.grad(blocked.blocked_attention(*parts), parts, grad)
    for first, second in zip(retained, again, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_future_is_not_seen() -> None:
    q, k, v, _ = inputs((1, 2, 2, 200, 200, 16), torch.float32)
    before = cpu_attention(q, k, v, 0.0)
    with torch.no_grad():
        k[:, :, 130:] = 1e4
        v[:, :, 130:] = 1e4
    assert torch.equal(cpu_attention(q, k, v, 0.0)[:, :, :130], before[:, :, :130])


@pytest.mark.parametrize("name", KERNELS)
def test_dropout_drops_and_keeps_the_mean(name: str) -> None:
    """With values of 1 each output is the sum of kept weights / 0.75: mean 1 over many, and not constant."""
    q, k, _, _ = inputs((4, 8, 8, 128, 128, 16), torch.float32)
    torch.manual_seed(0)
    out = KERNELS[name](q, k, torch.ones_like(k), 0.25)
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)
    assert out.std() > 0.01


def test_the_choice_follows_the_device() -> None:
    assert any_attention(torch.device("cpu")) is cpu_attention
    assert any_attention(torch.device("cuda")) is gpu_attention


STARTS = {
    (2, 6, 2, 150, 150, 8): ((40, 1, 109), (150,)),
    (1, 4, 2, 400, 400, 16): ((5, 250, 45, 100),),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", STARTS)
def test_documents_are_attended_to_alone(name: str, shape: tuple[int, ...]) -> None:
    rows = [torch.tensor(row) for row in STARTS[shape]]
    starts = torch.stack([torch.repeat_interleave(row.cumsum(0) - row, row) for row in rows])
    expected, *expected_grads = expected_of(shape, *STARTS[shape])
    *single, grad = inputs(shape, torch.float32)
    actual = KERNELS[name](*single, 0.0, starts)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(torch.autograd.grad(actual, single, grad), expected_grads, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_documents_with_weights_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "MAX_SAVED_BYTES", 0)
    test_documents_are_attended_to_alone("cpu", (1, 4, 2, 400, 400, 16))
