"""Windows, sparse layouts and biases by distance in every kernel, against float64 with a written-out mask.

A kernel that leaves out a key, reads the wrong block, adds a bias at the wrong distance or loses its gradient fails.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from megatron.block_sparsity import layout_of
from megatron.kernels import blocked_attention as blocked
from megatron.kernels.attention import cpu_attention, plain_attention, sdpa_attention
from megatron.kernels.attention_patterns import AttentionMask, BlockPattern, Window, window_for_package
from megatron.kernels.flex_attention import flex_attention, flex_unavailable

HEADS, KV_HEADS, LENGTH, SIZE = 4, 2, 210, 16
SPARSE = {"block": 16, "num_random_blocks": 1}
OWN = {"block": 8, "num_different_global_patterns": 4, "different_layout_per_head": True}


def flex(q: Tensor, k: Tensor, v: Tensor, dropout: float, starts: Tensor | None, view: AttentionMask) -> Tensor:
    assert flex_unavailable(q, k, dropout) is None
    return flex_attention(q, k, v, starts, view)


KERNELS = {"plain": plain_attention, "sdpa": sdpa_attention, "cpu": cpu_attention, "flex": flex}


def blocks(kind: str, options: dict[str, object]) -> BlockPattern:
    layout = layout_of(kind, options, 1)
    assert layout is not None
    return BlockPattern(layout, range(4, 4 + HEADS))


PATTERNS = {
    "none": None,
    "window of 5": Window(5),
    "window of 150": Window(150),
    "bigbird": blocks("bigbird", SPARSE),
    "fixed, heads differ": blocks("sparse_fixed", OWN),
}
STARTS = torch.tensor([[0] * 60 + [60] * 1 + [61] * 149, [0] * 200 + [200] * 10])


@functools.cache
def seen(name: str) -> Tensor:
    """Which key each query of each head sees, bool [n, s, s], place by place."""
    pattern = PATTERNS[name]
    table = torch.zeros(HEADS, LENGTH, LENGTH, dtype=torch.bool)
    for head in range(HEADS):
        for query in range(LENGTH):
            row = [True] * (query + 1)
            if isinstance(pattern, Window):
                row = [query - key < pattern.width for key in range(query + 1)]
            elif isinstance(pattern, BlockPattern):
                size = pattern.layout.block
                visible = pattern.layout.seen(query // size, 4 + head)
                row = [key // size in visible for key in range(query + 1)]
            table[head, query, : query + 1] = torch.tensor(row)
    return table


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, HEADS, LENGTH, SIZE), (2, KV_HEADS, LENGTH, SIZE), (2, KV_HEADS, LENGTH, SIZE), (HEADS, LENGTH)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return made, torch.randn(shapes[0], generator=generator, dtype=torch.float64).to(dtype)


def formula(parts: list[Tensor], mask: Tensor, *, biased: bool) -> Tensor:
    q, k, v, bias = parts
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(SIZE)
    if biased:
        distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).clamp(min=0)
        scores = scores + bias[:, distance]
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_and_gradients_equal_the_formula(pattern: str, biased: bool, documents: bool) -> None:
    mask = seen(pattern)[None]
    if documents:
        mask = mask & (torch.arange(LENGTH) >= STARTS[:, None, :, None])
    exact, grad = inputs(torch.float64)
    used = exact if biased else exact[:3]
    expected = formula(exact, mask, biased=biased)
    target = torch.autograd.grad(expected, used, grad)
    starts = STARTS if documents else None
    for name, kernel in KERNELS.items():
        single, grad32 = inputs(torch.float32)
        if name == "flex":  # on a CPU it has no backward pass; tests/gpu has it
            single = [each.detach() for each in single]
        view = AttentionMask(PATTERNS[pattern], single[3] if biased else None)
        actual = kernel(*single[:3], 0.0, starts, view)
        assert_near(name, actual, expected, atol=1e-5)
        if name != "flex":
            got = torch.autograd.grad(actual, single[: len(used)], grad32)
            for one, other in zip(got, target, strict=True):
                assert_near(name, one, other, atol=1e-4)


def assert_near(name: str, actual: Tensor, expected: Tensor, *, atol: float) -> None:
    torch.testing.assert_close(
        actual.double(), expected, rtol=1e-4, atol=atol, msg=lambda reported: f"{name}: {reported}"
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_weights_computed_again_give_the_same_gradients(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, grad = inputs(torch.float32)
    view = AttentionMask(PATTERNS[pattern], parts[3])
    retained = torch.autograd.grad(blocked.blocked_attention(*parts[:3], None, view), parts, grad)
    monkeypatch.setattr(blocked, "MAX_SAVED_BYTES", 0)
    again = torch.autograd.grad(blocked.blocked_attention(*parts[:3], None, view), parts, grad)
    for first, second in zip(retained, again, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_layout_grows_with_the_sequences() -> None:
    """A long sequence first, then a short one, then a longer one, each as in a new layout."""
    grown = blocks("bigbird", SPARSE)
    (q, k, v, _), _ = inputs(torch.float32)
    for length in (200, 30, 210):
        parts = [part[:, :, :length].detach() for part in (q, k, v)]
        fresh = cpu_attention(*parts, 0.0, None, AttentionMask(blocks("bigbird", SPARSE)))
        torch.testing.assert_close(cpu_attention(*parts, 0.0, None, AttentionMask(grown)), fresh, rtol=0, atol=0)
        torch.testing.assert_close(
            fresh, plain_attention(*parts, 0.0, None, AttentionMask(grown)), rtol=1e-4, atol=1e-5
        )


def test_hidden_keys_are_not_computed() -> None:
    """The saving: the keys that the blocks of queries multiply with, of those that full causal attention does."""
    length, device = 4096, torch.device("cpu")

    def share(pattern: Window | BlockPattern) -> float:
        full = own = 0
        for first in range(0, length, blocked.QUERIES):
            columns = pattern.columns(first, first + blocked.QUERIES, 0, device)
            full += first + blocked.QUERIES
            own += columns.stop - columns.start if isinstance(columns, slice) else len(columns)
        return own / full

    assert share(Window(256)) < 0.19
    assert share(blocks("local", {"block": 32})) < 0.1
    assert share(blocks("sparse_fixed", {"block": 32, "num_local_blocks": 8})) < 0.25
    assert share(blocks("bslongformer", {"block": 32})) < 0.12


def test_scores_beyond_fp16_stay_finite() -> None:
    """Scores of 1e5 overflow fp16; they are made in fp32, which is why no scaling by block number is needed."""
    q = torch.full((1, 1, 4, 64), 120.0, dtype=torch.float16)
    k = torch.linspace(100, 120, 4).to(torch.float16)[None, None, :, None].expand(1, 1, 4, 64)
    v = torch.eye(4, 64, dtype=torch.float16)[None, None]
    assert (q[0, 0, 0].double() @ k[0, 0, 3].double()) / 8 > 1e5
    torch.testing.assert_close(cpu_attention(q, k, v), v, rtol=0, atol=1e-3)  # each query sees the last key only


def test_what_packages_can_be_reported() -> None:
    starts, bias = torch.zeros(1, 4), torch.zeros(2, 4)
    assert window_for_package(None, None) == window_for_package(None, AttentionMask()) == -1
    assert window_for_package(None, AttentionMask(Window(5))) == 4
    assert (
        window_for_package(starts, None)
        is window_for_package(None, AttentionMask(None, bias))
        is window_for_package(None, AttentionMask(Window(5), bias))
        is None
    )
