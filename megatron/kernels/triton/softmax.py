"""Scale, mask and softmax of attention scores in one launch, for attention that needs its probabilities.

`megatron/kernels/softmax_attention.py` calls it; the plain twin is `plain_attention`. A row whose keys are all hidden
has the probabilities 0.

Shapes: b micro batch, n heads, s queries, k keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.triton import runtime


@triton.jit
def softmax_forward(
    scores, mask, y, scale, queries, keys, heads, mask_batch, mask_head, mask_row, mask_key,
    BLOCK: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One program a row of scores."""
    row = tl.program_id(0).to(tl.int64)
    query, head, batch = row % queries, row // queries % heads, row // queries // heads
    key = tl.arange(0, BLOCK)
    seen = key < keys
    if CAUSAL:
        seen = seen & (key <= query + keys - queries)
    if MASKED:
        at = mask + batch * mask_batch + head * mask_head + query * mask_row + key.to(tl.int64) * mask_key
        seen = seen & (tl.load(at, mask=key < keys, other=0) != 0)
    value = tl.load(scores + row * keys + key, mask=seen, other=0.0).to(tl.float32) * scale
    value = tl.where(seen, value, float("-inf"))
    largest = tl.max(value, axis=0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.where(seen, tl.exp(value - largest), 0.0)
    total = tl.sum(weight, axis=0)
    weight = weight / tl.where(total == 0.0, 1.0, total)
    tl.store(y + row * keys + key, weight.to(y.dtype.element_ty), mask=key < keys)


@triton.jit
def softmax_backward(dy, y, dx, scale, keys, BLOCK: tl.constexpr):
    """One program a row: scale * y * (dy - sum(y dy))."""
    row = tl.program_id(0).to(tl.int64)
    key = tl.arange(0, BLOCK)
    inside = key < keys
    weight = tl.load(y + row * keys + key, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dy + row * keys + key, mask=inside, other=0.0).to(tl.float32)
    gradient = scale * weight * (gradient - tl.sum(weight * gradient, axis=0))
    tl.store(dx + row * keys + key, gradient.to(dx.dtype.element_ty), mask=inside)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
        scores = scores.contiguous()
        y = torch.empty_like(scores)
        _, heads, queries, keys = scores.shape
        shown = scores if mask is None else mask.view(torch.uint8).expand(scores.shape)
        block = runtime.next_power_of_2(keys)
        runtime.launch(
            softmax_forward, (scores.numel() // max(1, keys),), scores, shown, y, scale, queries, keys, heads,
            *shown.stride(), BLOCK=block, CAUSAL=causal, MASKED=mask is not None, num_warps=runtime.warps_for(block),
        )  # fmt: skip
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (y,) = ctx.saved_tensors
        dy, dx, keys = grads[0].contiguous(), torch.empty_like(y), y.shape[-1]
        block = runtime.next_power_of_2(keys)
        rows = (y.numel() // max(1, keys),)
        runtime.launch(
            softmax_backward, rows, dy, y, dx, ctx.scale, keys, BLOCK=block, num_warps=runtime.warps_for(block)
        )
        return dx, None, None, None


def causal_softmax(scores: Tensor, scale: float) -> Tensor:
    """Softmax of scale * scores [b, n, s, k] over the keys up to each query; the queries are the last positions."""
    y: Tensor = _Softmax.apply(scores, None, scale, True)
    return y


def masked_softmax(scores: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax of scale * scores [b, n, s, k] over the keys that a bool mask shows, which broadcasts to the scores."""
    y: Tensor = _Softmax.apply(scores, mask, scale, False)
    return y
