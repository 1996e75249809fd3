"""Blocks of keys against the formula in float64: results, logarithms of sums, gradients; and which kernel has them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron.kernels import attention_blocks
from megatron.kernels.attention_blocks import Saved, Sight, block_backward, block_forward
from megatron.kernels.attention_patterns import AttentionMask, Window
from megatron.kernels.flash_blocks import flash_block_backward, flash_block_forward, flash_takes

SIZE = 16


@dataclass(frozen=True)
class Case:
    """A block of queries and keys; `gap` positions are between the keys and the queries of an earlier block."""

    queries: int
    keys: int = 0
    own: bool = False
    gap: int = 0
    documents: bool = False
    window: int | None = None
    heads: int = 4
    kv_heads: int = 2
    dtype: torch.dtype = torch.float32

    def sight(self) -> Sight:
        keys = torch.arange(self.keys or self.queries)
        queries = keys if self.own else self.keys + self.gap + torch.arange(self.queries)
        starts = None
        if self.documents:  # in the second row some queries see no key of the block
            rows = [(queries * 2 // 3), torch.where(queries > queries[len(queries) // 2], queries, queries // 4)]
            starts = torch.stack([row.cummax(0).values for row in rows])
        view = None if self.window is None else AttentionMask(Window(self.window))
        return Sight(queries, keys, self.own, starts, view, int(queries[-1]) + 1)


CASES = {
    "own": Case(331, own=True),
    "own, one query": Case(1, own=True),
    "own, documents": Case(200, own=True, documents=True),
    "own, window": Case(200, own=True, window=50),
    "own, window and documents": Case(290, own=True, window=70, documents=True, kv_heads=1),
    "earlier": Case(97, 193),
    "earlier, fewer keys": Case(331, 61, kv_heads=4),
    "earlier, one key": Case(13, 1),
    "earlier, one query": Case(1, 200),
    "earlier, documents": Case(200, 300, documents=True),
    "earlier, window": Case(200, 300, gap=17, window=90),
    "earlier, window and documents": Case(96, 192, window=150, documents=True),
    "earlier, behind every window": Case(20, 30, gap=50, window=40),
    "bf16, own": Case(200, own=True, dtype=torch.bfloat16),
    "bf16, earlier": Case(200, 301, documents=True, dtype=torch.bfloat16),
}


def fixed(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(case: Case, sight: Sight) -> list[Tensor]:
    """Queries, keys, values, and of all blocks together: logarithms of sums, results and their gradients."""
    queries, keys = len(sight.queries), len(sight.keys)
    q, out, grad = (fixed(2, case.heads, queries, SIZE, seed=seed) for seed in (1, 2, 3))
    k, v = (fixed(2, case.kv_heads, keys, SIZE, seed=seed) for seed in (4, 5))
    sums = fixed(2, case.heads, queries, seed=6).abs() + 5
    return [x.to(case.dtype) for x in (q, k, v)] + [sums.float()] + [x.to(case.dtype) for x in (out, grad)]


def scores(q: Tensor, k: Tensor, sight: Sight) -> Tensor:
    """By the formula."""
    products = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) / math.sqrt(SIZE)
    queries, keys = sight.queries[:, None], sight.keys
    hidden = (keys > queries)[None, None]
    if sight.starts is not None:
        hidden = hidden | (keys < sight.starts[:, None, :, None])
    if sight.view is not None:
        assert isinstance(sight.view.pattern, Window)
        hidden = hidden | (keys <= queries - sight.view.pattern.width)
    return products.masked_fill(hidden, -math.inf)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("plain", [False, True], ids=["compiled", "plain"])
def test_blocks_follow_the_formula(name: str, plain: bool) -> None:
    case = CASES[name]
    sight = case.sight()
    q, k, v, sums, out, grad = inputs(case, sight)
    exact_q, exact_k, exact_v, exact_sums, exact_out, exact_grad = (x.double() for x in (q, k, v, sums, out, grad))
    within = {"rtol": 1e-5, "atol": 1e-5} if case.dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with (
        patch.object(attention_blocks, "_compiled", lambda *given: False)
        if plain
        else patch.object(attention_blocks, "plain_block_forward", None)
    ):
        found, logarithms = block_forward(q, k, v, sight)
        gradients = block_backward(Saved(q, sums, grad, out), k, v, sight)
    of_group = exact_v.repeat_interleave(case.heads // case.kv_heads, 1)
    expected = scores(exact_q, exact_k, sight)
    weights = expected.softmax(-1).nan_to_num(0.0)  # a query that sees nothing
    torch.testing.assert_close(found.double(), weights @ of_group, **within)
    torch.testing.assert_close(logarithms.double(), expected.logsumexp(-1), **within)
    assert bool((logarithms == -math.inf).any()) == bool((expected == -math.inf).all(-1).any())

    weights = (expected - exact_sums[..., None]).exp()
    by_score = weights * (exact_grad @ of_group.transpose(-1, -2) - (exact_grad * exact_out).sum(-1, keepdim=True))
    wide_k = exact_k.repeat_interleave(case.heads // case.kv_heads, 1)
    sums_of = lambda x: x.unflatten(1, (case.kv_heads, -1)).sum(2)  # noqa: E731
    for got, value in (
        (gradients.q, by_score @ wide_k / math.sqrt(SIZE)),
        (gradients.k, sums_of(by_score.transpose(-1, -2) @ exact_q) / math.sqrt(SIZE)),
        (gradients.v, sums_of(weights.transpose(-1, -2) @ exact_grad)),
    ):
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(got.double() / scale, value / scale, **within)


def test_empty_blocks_are_left_out() -> None:
    assert CASES["earlier, behind every window"].sight().empty()
    assert [name for name, case in CASES.items() if case.sight().empty()] == ["earlier, behind every window"]


def test_flash_attention_is_for_half_precision_on_gpus() -> None:
    assert not flash_takes(torch.zeros(1, 1, 8, SIZE, dtype=torch.bfloat16))


def test_flash_attention_has_the_shapes_of_blocks() -> None:
    """Of the operators' signatures, on tensors without memory."""
    q, k, v = (torch.empty(2, heads, 8, SIZE, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    out, sums = flash_block_forward(q, k, v, own=False)
    assert (out.shape, sums.shape, sums.dtype) == (q.shape, q.shape[:3], torch.float32)
    gradients = flash_block_backward((q, out, sums), k, v, out, own=False)
    assert [each.shape for each in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.gpu
@pytest.mark.parametrize("own", [True, False])
def test_flash_attention_follows_the_plain_blocks(own: bool) -> None:
    case = Case(256, 0 if own else 128, own=own, dtype=torch.bfloat16)
    sight = case.sight()
    q, k, v, _, _, grad = (x.cuda() for x in inputs(case, sight))
    assert flash_takes(q)
    expected, logarithms = attention_blocks.plain_block_forward(q.cpu(), k.cpu(), v.cpu(), sight)
    found, sums = flash_block_forward(q, k, v, own=own)
    torch.testing.assert_close(found.cpu().float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(sums.cpu(), logarithms, rtol=1e-3, atol=1e-3)
    saved = Saved(*(x.cpu() for x in (q, sums, grad, found)))
    gradients = attention_blocks.plain_block_backward(saved, k.cpu(), v.cpu(), sight)
    got = flash_block_backward((q, found, sums), k, v, grad, own=own)
    for one, other in zip(got, (gradients.q, gradients.k, gradients.v), strict=True):
        torch.testing.assert_close(one.cpu().float(), other, rtol=3e-2, atol=3e-2)
