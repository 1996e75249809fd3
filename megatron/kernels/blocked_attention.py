"""Causal attention for the CPU: a block of queries at a time against the keys that it can see.

Compared with torch's scaled_dot_product_attention on a processor, the products here are large enough for the matrix
library, and blocks of keys in the future are never computed. The weights of a block are kept for the backward pass
while they are few, and computed again when they are many. Where a sequence holds several documents, keys before the
earliest document of a block are not computed either.

Shapes: b micro batch, n query heads, m key/value heads (n = g * m), s positions, d head dim, r rows of a block (g times
its queries). The g query heads of one key/value head are rows of one product, so no key or value is copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

QUERIES = 128
"""Queries of a block, measured best for 512 positions and heads of 32 and 64."""

KEPT_BYTES = 256 << 20
"""Most memory that one call's weights may take until its backward pass."""


def _blocks(length: int) -> Iterator[slice]:
    for start in range(0, length, QUERIES):
        yield slice(start, min(start + QUERIES, length))


def _rows(x: Tensor, heads: int, block: slice) -> Tensor:
    """The rows of a block of queries: [b, n, s, d] -> [b * m, r, d]."""
    batch, _, _, size = x.shape
    return x.unflatten(1, (heads, -1))[:, :, :, block].reshape(batch * heads, -1, size)


def _put_rows(x: Tensor, heads: int, block: slice, rows: Tensor) -> None:
    """The opposite of ``_rows``, in place."""
    target = x.unflatten(1, (heads, -1))[:, :, :, block]
    target.copy_(rows.view(target.shape))


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _seen(block: slice, starts: Tensor | None) -> slice:
    """The keys that some query of the block sees."""
    return slice(0 if starts is None else int(starts[:, block].min()), block.stop)


def _weights(rows: Tensor, keys: Tensor, block: slice, seen: slice, starts: Tensor | None) -> Tensor:
    """Softmax over the visible keys: rows [b * m, r, d] and fp32 keys [b * m, s, d] -> [b * m, r, seen].

    Scores rounded to bf16 would cost several times more precision than weights rounded to it, hence fp32.
    """
    scores = torch.bmm(rows.to(keys.dtype) / math.sqrt(rows.shape[-1]), keys[:, seen].transpose(1, 2))
    queries = block.stop - block.start
    future = torch.full((queries, queries), float("-inf"), dtype=scores.dtype).triu_(1)
    by_query = scores.unflatten(1, (-1, queries))  # [b * m, g, queries, seen]
    by_query[..., -queries:].add_(future)
    if starts is not None:
        before = torch.arange(seen.start, seen.stop) < starts[:, block, None]  # [b, queries, seen]
        by_query.unflatten(0, (len(starts), -1)).masked_fill_(before[:, None, None], float("-inf"))
    return torch.softmax(scores, dim=-1).to(rows.dtype)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> Tensor:
        heads, length = k.shape[1:3]
        keys, values = (x.reshape(-1, length, x.shape[-1]).contiguous() for x in (k, v))  # [b * m, s, d]
        keep = q.shape[0] * q.shape[1] * length * length // 2 * q.element_size() <= KEPT_BYTES
        out = torch.empty(q.shape, dtype=q.dtype)
        wide_keys = _wide(keys)
        kept = []
        for block in _blocks(length):
            seen = _seen(block, starts)
            weights = _weights(_rows(q, heads, block), wide_keys, block, seen, starts)
            _put_rows(out, heads, block, torch.bmm(weights, values[:, seen]))
            if keep:
                kept.append(weights)
        ctx.save_for_backward(q, keys, values, starts, *kept)
        ctx.heads = heads
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, keys, values, starts, *kept = ctx.saved_tensors
        heads, length = ctx.heads, q.shape[2]
        scale = 1 / math.sqrt(q.shape[-1])
        wide_keys = keys if kept else _wide(keys)
        grad_q = torch.empty(q.shape, dtype=q.dtype)
        grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
        for number, block in enumerate(_blocks(length)):
            seen = _seen(block, starts)
            rows = _rows(q, heads, block)
            weights = kept[number] if kept else _weights(rows, wide_keys, block, seen, starts)
            grad_rows = _rows(grads[0], heads, block)
            grad_v[:, seen].baddbmm_(weights.transpose(1, 2), grad_rows)
            grad_weights = torch.bmm(grad_rows, values[:, seen].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            _put_rows(grad_q, heads, block, torch.bmm(grad_scores, keys[:, seen]).mul_(scale))
            grad_k[:, seen].baddbmm_(grad_scores.transpose(1, 2), rows)
        shape = (q.shape[0], heads, length, -1)
        return grad_q, grad_k.mul_(scale).view(shape), grad_v.view(shape), None


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None) -> Tensor:
    """Causal attention of whole sequences: q [b, n, s, d], k and v [b, m, s, d] -> [b, n, s, d]. CPU only.

    starts [b, s]: the first key that each query may see, at most its own place and never falling; 0 unless given.
    """
    out: Tensor = _BlockedAttention.apply(q, k, v, starts)
    return out
