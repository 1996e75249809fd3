"""Attention whose softmax sums a logit of each head besides the keys, against the formula in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.kernels.attention import cpu_attention, masked_attention, plain_attention, sdpa_attention
from megatron.kernels.attention_patterns import AttentionMask, Window, window_for_package
from megatron.kernels.cpp_attention import cpp_attention_unavailable
from megatron.kernels.sink_attention import sink_attention
from megatron.registry.attention import choose_backend
from tests.kernels.test_attention_backends import HOPPER

BATCH, HEADS, GROUPS, LENGTH = 2, 4, 2, 37
KERNELS: dict[str, Any] = {
    "sinks": sink_attention,
    "plain": plain_attention,
    "sdpa": sdpa_attention,
    "cpu": cpu_attention,
}
MASKS = ("causal", "window", "documents", "bias")


def inputs(head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values, sinks and a bias by distance, with gradients."""
    draws = torch.Generator().manual_seed(7)
    shapes = [(BATCH, heads, LENGTH, head_dim) for heads in (HEADS, GROUPS, GROUPS)]
    found = [torch.randn(shape, generator=draws) for shape in [*shapes, (HEADS,), (HEADS, LENGTH)]]
    return [one.to(dtype).requires_grad_() for one in found]


def starts() -> Tensor:
    """A second document from position 20 on, in the first row."""
    found = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    found[0, 20:] = 20
    return found


def formula(parts: list[Tensor], name: str) -> Tensor:
    """Scores, a further column for the sink, softmax, product; in float64."""
    q, k, v, sinks, bias = (part.double() for part in parts)
    k, v = (part.repeat_interleave(HEADS // GROUPS, dim=1) for part in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    at = torch.arange(LENGTH)
    distance = at[:, None] - at
    hidden = (distance < 0)[None, None]
    if name == "window":
        hidden = hidden | (distance >= 5)
    if name == "documents":
        hidden = hidden | (at < starts()[:, :, None])[:, None]
    if name == "bias":
        scores = scores + bias[:, distance.clamp(min=0)]
    scores = scores.masked_fill(hidden, float("-inf"))
    column = sinks[None, :, None, None].expand(BATCH, HEADS, LENGTH, 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ v


def attend(kernel: str, parts: list[Tensor], name: str) -> Tensor:
    q, k, v, sinks, bias = parts
    view = AttentionMask(Window(5) if name == "window" else None, bias if name == "bias" else None, sinks=sinks)
    out: Tensor = KERNELS[kernel](q, k, v, 0.0, starts() if name == "documents" else None, view)
    return out


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("head_dim", [16, 6], ids=["compiled", "plain products"])
def test_values_and_gradients_are_the_formula_s(kernel: str, name: str, head_dim: int) -> None:
    parts = inputs(head_dim, torch.float32)
    found, expected = attend(kernel, parts, name), formula(parts, name)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    leaves = parts if name == "bias" else parts[:4]
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    got, right = (torch.autograd.grad(out, leaves, grad.to(out.dtype)) for out in (found, expected))
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_bfloat16_is_near_float64(name: str) -> None:
    parts = inputs(16, torch.bfloat16)
    found, expected = attend("sinks", parts, name), formula(parts, name)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=1e-2)
    gradients = torch.autograd.grad(found.float().sum(), parts[:4]), torch.autograd.grad(expected.sum(), parts[:4])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=5e-2, atol=5e-2)


def test_a_cached_row_sums_the_sinks() -> None:
    q, k, v, sinks, _ = (part.detach() for part in inputs(16, torch.float32))
    seen = torch.ones(1, 1, 1, LENGTH, dtype=torch.bool)
    found = masked_attention(q[:, :, -1:], k, v, seen, AttentionMask(sinks=sinks))
    torch.testing.assert_close(found, sink_attention(q, k, v, view=AttentionMask(sinks=sinks))[:, :, -1:])
    assert not torch.allclose(found, masked_attention(q[:, :, -1:], k, v, seen), atol=1e-2)


def test_a_far_sink_changes_nothing_and_a_high_one_takes_all() -> None:
    q, k, v, sinks, _ = (part.detach() for part in inputs(16, torch.float32))
    low, high = (sink_attention(q, k, v, view=AttentionMask(sinks=torch.full_like(sinks, at))) for at in (-1e4, 1e4))
    torch.testing.assert_close(low, plain_attention(q, k, v))
    assert not high.any()


def test_dropout_and_a_bound_take_the_formula() -> None:
    q, k, v, sinks, _ = (part.detach() for part in inputs(16, torch.float32))
    view = AttentionMask(sinks=sinks, softcap=2.0)
    capped = sink_attention(q, k, v, view=view)
    scores = 2.0 * torch.tanh(q @ k.repeat_interleave(HEADS // GROUPS, dim=1).mT / 4.0 / 2.0)
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf"))
    weights = view.softmax(scores)
    torch.testing.assert_close(capped, weights @ v.repeat_interleave(HEADS // GROUPS, dim=1))
    torch.manual_seed(1)
    dropped = torch.stack([sink_attention(q, k, v, 0.5, None, AttentionMask(sinks=sinks)) for _ in range(400)])
    full = sink_attention(q, k, v, view=AttentionMask(sinks=sinks))
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.mean(0), full, rtol=0.0, atol=0.35)


def test_without_sinks_it_is_an_error() -> None:
    q, k, v, *_ = inputs(16, torch.float32)
    with pytest.raises(ValueError, match="needs the logits of sinks"):
        sink_attention(q, k, v, view=AttentionMask())


def test_no_other_backend_takes_sinks() -> None:
    q, *_, sinks, _ = inputs(16, torch.float32)
    assert window_for_package(None, AttentionMask(sinks=sinks)) is None
    assert "sinks" in (cpp_attention_unavailable(q, q, AttentionMask(sinks=sinks)) or "")
    choice = choose_backend(replace(HOPPER, sinks=True))
    assert choice.entry.name == "sinks"
    assert choose_backend(HOPPER).entry.name != "sinks"
    assert "more than the keys" in choose_backend(HOPPER).rejected["sinks"]
    with pytest.raises(LookupError, match="sums the keys alone"):
        choose_backend(replace(HOPPER, sinks=True, kernels=replace(HOPPER.kernels, compiled=True)))
