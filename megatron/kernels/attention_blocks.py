"""Attention of some queries to some keys of a sequence, with the logarithm of each query's sum, by which results of
several blocks of keys are merged (arXiv:2205.14135, section 3.1; arXiv:2310.01889, section 3).

On a CPU the compiled kernel computes a block without a bias, on a GPU torch's flash attention one without a mask.
Others, and blocks in fp64, are plain products of bounded size.

A block of keys is either the queries' own part of the sequence, under the causal mask, or an earlier part, which every
query sees as far as documents and patterns allow. The backward pass computes the weights of a block again from the
logarithm of the sum over all blocks, so nothing of the size [queries, keys] is saved. Scores and sums are in fp32.

Shapes: b micro batch, n query heads, m key/value heads (n = g * m), s queries, k keys, d head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.kernels.attention_patterns import AttentionMask, Window
from megatron.kernels.cpp_attention import cpp_attention_unavailable, cpp_block_backward, cpp_block_forward
from megatron.kernels.flash_blocks import flash_block_backward, flash_block_forward, flash_takes

CELLS = 1 << 22
"""Scores that are in memory at once."""


@dataclass(frozen=True)
class Sight:
    """What the queries of a block see of its keys. Positions increase, and are those in the full sequence."""

    queries: Tensor
    """Positions of the queries, int64 [s]."""
    keys: Tensor
    """Positions of the keys, int64 [k]."""
    own: bool
    """True if keys are the queries' own positions; false if all of them are before all queries."""
    starts: Tensor | None = None
    """First key that each query may see, a position [b, s], or None."""
    view: AttentionMask | None = None
    """Pattern of hidden keys and bias by distance, or None."""
    length: int = 0
    """Length of the full sequence [tokens]."""

    @property
    def plain(self) -> bool:
        """Whether nothing besides the causal mask hides keys or adds to scores."""
        return self.starts is None and (self.view is None or (self.view.pattern is None and self.view.bias is None))

    def rows(self, some: slice) -> Sight:
        """Returns what some of the queries see."""
        starts = None if self.starts is None else self.starts[:, some]
        return Sight(self.queries[some], self.keys, self.own, starts, self.view, self.length)

    def hidden(self) -> Tensor | None:
        """Returns true where a key is hidden, [b or 1, n or 1, s, k], or None if none is."""
        found = None
        queries, keys = self.queries[:, None], self.keys
        if self.own:
            found = (keys > queries)[None, None]
        if self.starts is not None:
            before = (keys < self.starts[:, :, None])[:, None]
            found = before if found is None else found | before
        pattern = None if self.view is None else self.view.pattern
        if pattern is not None:
            if isinstance(pattern, Window):
                seen = pattern.sees(queries, keys)[None, None]
            else:  # patterns of blocks are asked for every key of the sequence
                every = torch.arange(self.length, device=keys.device)
                seen = pattern.sees(queries[None], every[None, None])[..., keys][None]
            found = ~seen if found is None else found | ~seen
        return found

    def first(self) -> Tensor | None:
        """Returns the first key of the block that each query sees, int32 [b or 1, s], or None if that is 0 for all.

        Only where the pattern is a window, or none.
        """
        window = None if self.view is None else self.view.pattern
        bound = self.starts
        if isinstance(window, Window):
            inside = (self.queries - (window.width - 1))[None]
            bound = inside if bound is None else torch.maximum(bound, inside)
        return None if bound is None else torch.searchsorted(self.keys, bound, out_int32=True)

    def distances(self) -> Tensor:
        """Returns the distance of each key before each query, [s, k]; 0 for later keys."""
        return (self.queries[:, None] - self.keys).clamp_(min=0)

    def empty(self) -> bool:
        """Whether no query sees a key; false where finding out would make the host wait for a GPU."""
        if self.own or self.keys.device.type != "cpu":
            return False
        last = int(self.keys[-1])
        if self.starts is not None and int(self.starts.min()) > last:
            return True
        pattern = None if self.view is None else self.view.pattern
        return isinstance(pattern, Window) and int(self.queries[0]) - pattern.width >= last


@dataclass(frozen=True)
class BlockGradients:
    """Gradients of a block, in fp32 or the type of the queries."""

    q: Tensor
    """[b, n, s, d]."""
    k: Tensor
    """[b, m, k, d]."""
    v: Tensor
    """[b, m, k, d]."""


@dataclass(frozen=True)
class Saved:
    """What the backward pass of every block of some queries needs besides keys and values."""

    q: Tensor
    """Queries [b, n, s, d]."""
    sums: Tensor
    """Logarithm of each row's sum over all blocks, [b, n, s]."""
    grad: Tensor
    """Gradient of the result over all blocks, [b, n, s, d]."""
    out: Tensor
    """The result over all blocks, [b, n, s, d]."""

    def rows(self, some: slice) -> Saved:
        """Returns those of some of the queries."""
        return Saved(self.q[:, :, some], self.sums[:, :, some], self.grad[:, :, some], self.out[:, :, some])


def block_forward(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    """Returns the attention to a block of keys [b, n, s, d], and the logarithm of each row's sum [b, n, s], fp32.

    A query that sees no key has a result of 0, and -inf for the logarithm.

    Args:
        q: queries [b, n, s, d].
        k: keys [b, m, k, d].
        v: values [b, m, k, d].
        sight: what the queries see.
    """
    if _compiled(q, k, sight):
        return cpp_block_forward(q, k, v, _expanded(sight.first(), q), own=sight.own)
    if sight.plain and flash_takes(q):
        return flash_block_forward(q, k, v, own=sight.own)
    return plain_block_forward(q, k, v, sight)


def block_backward(
    saved: Saved, k: Tensor, v: Tensor, sight: Sight, bias_gradient: Tensor | None = None
) -> BlockGradients:
    """Returns the gradients that a block of keys contributes.

    Args:
        saved: queries, and what the forward pass over all blocks found for them.
        k: keys [b, m, k, d].
        v: values [b, m, k, d].
        sight: what the queries see.
        bias_gradient: fp32 [n, distances], to which the gradient of the bias is added, or None.
    """
    q, forward = saved.q, (saved.q, saved.out, saved.sums)
    if _compiled(q, k, sight):
        first = _expanded(sight.first(), q)
        return BlockGradients(*cpp_block_backward(forward, k, v, saved.grad, first, own=sight.own))
    if sight.plain and flash_takes(q):
        return BlockGradients(*flash_block_backward(forward, k, v, saved.grad, own=sight.own))
    return plain_block_backward(saved, k, v, sight, bias_gradient)


def _compiled(q: Tensor, k: Tensor, sight: Sight) -> bool:
    """Returns whether the compiled kernel for CPUs takes a block."""
    biased = sight.view is not None and sight.view.bias is not None
    return not biased and q.dtype != torch.float64 and cpp_attention_unavailable(q, k, sight.view) is None


def _expanded(first: Tensor | None, q: Tensor) -> Tensor | None:
    """Returns the first keys of every row of the batch, contiguous."""
    return None if first is None else first.expand(len(q), -1).contiguous()


def plain_block_forward(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    """Reference implementation of ``block_forward``.

    Args:
        q: queries [b, n, s, d].
        k: keys [b, m, k, d].
        v: values [b, m, k, d].
        sight: what the queries see.
    """
    out, sums = [], []
    wide_k, wide_v = _wide(k), _wide(v)
    for some in _row_blocks(q, k):
        scores = _scores(q[:, :, some], wide_k, sight.rows(some))  # [b, n, rows, k]
        total = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - _finite(total)[..., None])
        out.append(_heads(_grouped(weights, k) @ wide_v, q))
        sums.append(total)
    return torch.cat(out, dim=2), torch.cat(sums, dim=2)


def plain_block_backward(
    saved: Saved, k: Tensor, v: Tensor, sight: Sight, bias_gradient: Tensor | None = None
) -> BlockGradients:
    """Reference implementation of ``block_backward``.

    Args:
        saved: queries, and what the forward pass over all blocks found for them.
        k: keys [b, m, k, d].
        v: values [b, m, k, d].
        sight: what the queries see.
        bias_gradient: fp32 [n, distances], to which the gradient of the bias is added, or None.
    """
    wide_k, wide_v = _wide(k), _wide(v)
    grad_q = []
    grad_k, grad_v = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    scale = 1 / math.sqrt(k.shape[-1])
    for some in _row_blocks(saved.q, k):
        part, seen = saved.rows(some), sight.rows(some)
        weights = torch.exp(_scores(part.q, wide_k, seen) - part.sums[..., None])  # [b, n, rows, k]
        grad = _grouped(_wide(part.grad), k)  # [b, m, g rows, d]
        dots = (_wide(part.grad) * part.out).sum(-1)  # [b, n, rows]
        grad_v += _grouped(weights, k).transpose(-1, -2) @ grad
        grad_weights = _heads(grad @ wide_v.transpose(-1, -2), part.q)
        grad_scores = weights.mul_(grad_weights - dots[..., None])
        if bias_gradient is not None:
            by_head = grad_scores.sum(0).flatten(1).to(bias_gradient.dtype)
            bias_gradient.index_add_(1, seen.distances().flatten(), by_head)
        grouped = _grouped(grad_scores, k)
        grad_q.append(_heads(grouped @ wide_k, part.q).mul_(scale))
        grad_k += (grouped.transpose(-1, -2) @ _grouped(_wide(part.q), k)).mul_(scale)
    return BlockGradients(torch.cat(grad_q, dim=2), grad_k, grad_v)


def _scores(q: Tensor, wide_k: Tensor, sight: Sight) -> Tensor:
    """Returns masked and biased scores, fp32 [b, n, s, k]."""
    products = _grouped(_wide(q) / math.sqrt(q.shape[-1]), wide_k) @ wide_k.transpose(-1, -2)
    scores = _heads(products, q)
    if sight.view is not None and sight.view.bias is not None:
        scores = scores + sight.view.bias[:, sight.distances()].to(scores.dtype)
    hidden = sight.hidden()
    return scores if hidden is None else scores.masked_fill(hidden, float("-inf"))


def _row_blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Yields blocks of queries whose scores are of bounded size."""
    length = q.shape[2]
    rows = max(1, min(length, CELLS // (q.shape[0] * q.shape[1] * k.shape[2])))
    for start in range(0, length, rows):
        yield slice(start, min(start + rows, length))


def _wide(x: Tensor) -> Tensor:
    """Converts to at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _finite(sums: Tensor) -> Tensor:
    """Returns the sums, with 0 for those of no key."""
    return sums.masked_fill(sums == float("-inf"), 0.0)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """Query heads of one key/value head become rows of one product: [b, n, s, .] -> [b, m, g s, .]."""
    return x.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """Inverse of ``_grouped``: [b, m, g s, .] -> [b, n, s, .]."""
    return x.unflatten(2, (-1, q.shape[2])).flatten(1, 2)
