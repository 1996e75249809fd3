"""Causal attention for the CPU: one block of queries at a time against the keys that it sees.

Compared with torch's scaled_dot_product_attention on a CPU, the products here are large enough for the matrix library,
and blocks of keys in the future are never computed. The weights of a block are saved for the backward pass if they are
small, and recomputed otherwise. Keys before the earliest document of a block, and keys that no query of a block sees,
are not computed either. So the cost of a sliding window or a sparse layout is proportional to its visible blocks: the
visible keys are a slice, or are gathered if they are not contiguous.

Shapes: b micro batch, n query heads, m key/value heads (n = g * m), s positions, d head dim, r rows of a block (g times
its queries). The g query heads of one key/value head are rows of one product, so no key or value is copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron.kernels.attention_patterns import AttentionMask
from megatron.kernels.cpu_features import needs_fp32_matmul

QUERIES = 128
"""Queries of a block, measured best for 512 positions and heads of 32 and 64."""

MAX_SAVED_BYTES = 256 << 20
"""Largest size of a call's weights that are saved for its backward pass."""


def _blocks(length: int) -> Iterator[slice]:
    for start in range(0, length, QUERIES):
        yield slice(start, min(start + QUERIES, length))


def _rows(x: Tensor, heads: int, block: slice) -> Tensor:
    """Returns the rows of a block of queries: [b, n, s, d] -> [b * m, r, d]."""
    batch, _, _, size = x.shape
    return x.unflatten(1, (heads, -1))[:, :, :, block].reshape(batch * heads, -1, size)


def _put_rows(x: Tensor, heads: int, block: slice, rows: Tensor) -> None:
    """Inverse of ``_rows``, in place."""
    target = x.unflatten(1, (heads, -1))[:, :, :, block]
    target.copy_(rows.view(target.shape))


def _to_fp32(x: Tensor) -> Tensor:
    """Converts to at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


Seen = slice | Tensor
"""Visible keys, as a slice or by their positions in order."""


def _seen(block: slice, starts: Tensor | None, view: AttentionMask | None, device: torch.device) -> Seen:
    """Returns the keys that some query of the block sees; the last of them are the block's own."""
    first = 0 if starts is None else int(starts[:, block].min())
    if view is None or view.pattern is None:
        return slice(first, block.stop)
    return view.pattern.columns(block.start, block.stop, first, device)


def _hide(scores: Tensor, block: slice, seen: Seen, starts: Tensor | None, view: AttentionMask | None) -> None:
    """Adds a bias, and -inf for hidden keys, in place: scores [b, m, g, queries, seen]."""
    queries = block.stop - block.start
    future = torch.full((queries, queries), float("-inf"), dtype=scores.dtype).triu_(1)
    scores[..., -queries:].add_(future)
    if starts is None and view is None:
        return
    rows = torch.arange(block.start, block.stop)[:, None]
    keys = torch.arange(seen.start, seen.stop) if isinstance(seen, slice) else seen
    if starts is not None:
        before = keys < starts[:, block, None]  # [b, queries, seen]
        scores.masked_fill_(before[:, None, None], float("-inf"))
    if view is not None and view.bias is not None:
        scores.add_(view.bias[:, _distance(rows, keys)].view(scores.shape[1:]))
    if view is not None and view.pattern is not None:
        hidden = ~view.pattern.sees(rows, keys[None])  # [n or 1 or none, queries, seen]
        heads = scores.shape[1:3] if hidden.dim() == 3 and hidden.shape[0] > 1 else (1, 1)
        scores.masked_fill_(hidden.view(*heads, *hidden.shape[-2:]), float("-inf"))


def _distance(rows: Tensor, keys: Tensor) -> Tensor:
    """Returns the distance of each key before each query, [queries, seen]; 0 for later keys."""
    return (rows - keys).clamp_(min=0)


def _weights(
    rows: Tensor, keys: Tensor, block: slice, seen: Seen, starts: Tensor | None, view: AttentionMask | None, batch: int
) -> tuple[Tensor, Tensor | None]:
    """Softmax over the visible keys: rows [b * m, r, d] and fp32 keys [b * m, s, d] -> [b * m, r, seen].

    The second result is the derivative of bounded scores by those without a bound, where there is one. Rounding scores
    to bf16 costs several times more precision than rounding weights, hence fp32.
    """
    scores = torch.bmm(rows.to(keys.dtype) / math.sqrt(rows.shape[-1]), keys[:, seen].transpose(1, 2))
    slopes = None
    if view is not None and view.softcap is not None:
        share = scores.div_(view.softcap).tanh_()
        slopes, scores = 1 - share.square(), share.mul_(view.softcap)
    by_head = scores.unflatten(1, (-1, block.stop - block.start)).unflatten(0, (batch, -1))
    _hide(by_head, block, seen, starts, view)
    return torch.softmax(scores, dim=-1).to(rows.dtype), slopes


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left right, [b * m, ., .]; in fp32, rounded once, if the CPU has no instructions for their type."""
    if needs_fp32_matmul(left.device, left.dtype):
        return torch.bmm(left.float(), right.float()).to(left.dtype)
    return torch.bmm(left, right)


def _add_product(total: Tensor, seen: Seen, left: Tensor, right: Tensor) -> None:
    """Adds leftᵀ right to the seen keys or values: [b * m, s, d], of [b * m, r, seen] and [b * m, r, d]."""
    left = left.transpose(1, 2)
    if not isinstance(seen, slice):
        total.index_add_(1, seen, _product(left, right))
    elif needs_fp32_matmul(left.device, left.dtype):
        total[:, seen].add_(_product(left, right))
    else:
        total[:, seen].baddbmm_(left, right)


def _count(seen: Seen) -> int:
    return seen.stop - seen.start if isinstance(seen, slice) else len(seen)


def _add_bias_gradient(total: Tensor, grad_scores: Tensor, block: slice, seen: Seen, batch: int) -> None:
    """Adds the gradient of the scores to that of a bias by distance: [n, distances] and [b * m, r, seen]."""
    queries = block.stop - block.start
    by_head = grad_scores.unflatten(1, (-1, queries)).unflatten(0, (batch, -1)).sum(0, dtype=total.dtype)
    by_head = by_head.flatten(0, 1)  # [n, queries, seen]
    keys = torch.arange(seen.start, seen.stop) if isinstance(seen, slice) else seen
    distance = _distance(torch.arange(block.start, block.stop)[:, None], keys).flatten()
    total.index_add_(1, distance, by_head.flatten(1))


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        starts: Tensor | None,
        view: AttentionMask | None,
    ) -> Tensor:
        heads, length = k.shape[1:3]
        keys, values = (x.reshape(-1, length, x.shape[-1]).contiguous() for x in (k, v))  # [b * m, s, d]
        parts = [(block, _seen(block, starts, view, q.device)) for block in _blocks(length)]
        cells = sum((block.stop - block.start) * _count(seen) for block, seen in parts)
        bound = None if view is None else view.softcap
        keep = bound is None and q.shape[0] * q.shape[1] * cells * q.element_size() <= MAX_SAVED_BYTES
        out = torch.empty(q.shape, dtype=q.dtype)
        wide_keys = _to_fp32(keys)
        saved = []
        for block, seen in parts:
            weights, _ = _weights(_rows(q, heads, block), wide_keys, block, seen, starts, view, len(q))
            _put_rows(out, heads, block, _product(weights, values[:, seen]))
            if keep:
                saved.append(weights)
        ctx.save_for_backward(q, keys, values, bias, starts, *saved)
        ctx.heads, ctx.parts, ctx.pattern, ctx.bound = heads, parts, None if view is None else view.pattern, bound
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        q, keys, values, bias, starts, *saved = ctx.saved_tensors
        heads, length, batch = ctx.heads, q.shape[2], len(q)
        view = AttentionMask(ctx.pattern, bias, softcap=ctx.bound)
        scale = 1 / math.sqrt(q.shape[-1])
        wide_keys = keys if saved else _to_fp32(keys)
        grad_q = torch.empty(q.shape, dtype=q.dtype)
        grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        for number, (block, seen) in enumerate(ctx.parts):
            rows = _rows(q, heads, block)
            if saved:
                weights, slopes = saved[number], None
            else:
                weights, slopes = _weights(rows, wide_keys, block, seen, starts, view, batch)
            grad_rows = _rows(grads[0], heads, block)
            _add_product(grad_v, seen, weights, grad_rows)
            grad_weights = _product(grad_rows, values[:, seen].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if grad_bias is not None:
                _add_bias_gradient(grad_bias, grad_scores, block, seen, batch)
            if slopes is not None:  # a bias is added behind the bound
                grad_scores = grad_scores * slopes.to(grad_scores.dtype)
            _put_rows(grad_q, heads, block, _product(grad_scores, keys[:, seen]).mul_(scale))
            _add_product(grad_k, seen, grad_scores, rows)
        shape = (q.shape[0], heads, length, -1)
        return grad_q, grad_k.mul_(scale).view(shape), grad_v.view(shape), grad_bias, None, None


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None, view: AttentionMask | None = None
) -> Tensor:
    """Causal attention of full sequences: q [b, n, s, d], k and v [b, m, s, d] -> [b, n, s, d]. CPU only.

    Args:
        q: queries.
        k: keys.
        v: values.
        starts: first key that each query may see [b, s], at most its own position and never decreasing; 0 unless set.
        view: bounds scores, hides further keys, and adds a bias, which gets a gradient.
    """
    bias = None if view is None else view.bias
    out: Tensor = _BlockedAttention.apply(q, k, v, bias, starts, view)
    return out
