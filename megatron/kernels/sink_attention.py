"""Causal attention whose softmax sums a logit of each head besides the keys: the sinks of GPT-OSS, and off-by-one.

A sink takes a part of each query's probability and gives it to no value. With the logarithm L of a row's sum over the
keys and the sink's logit a, the result is that of ordinary attention times sigmoid(L - a). So a kernel that gives L
computes the values, and, with L replaced by log(exp(L) + exp(a)), the gradients of queries, keys and values.

Shapes: b micro batch, n query heads, m key/value heads, s sequence, d head dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.kernels.attention import plain_attention
from megatron.kernels.attention_blocks import Saved, Sight, block_backward, block_forward
from megatron.kernels.attention_patterns import AttentionMask


def with_sinks(out: Tensor, sums: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the attention to keys and sinks [b, n, s, d], and the logarithm of each row's sum over both [b, n, s].

    Args:
        out: Attention to all keys [b, n, s, d].
        sums: Logarithm of each row's sum over the keys [b, n, s].
        sinks: Logits [n].
    """
    total = torch.logaddexp(sums, sinks.to(sums.dtype)[:, None])
    return out * (sums - total).exp()[..., None], total


def sink_gradient(saved: Saved, sinks: Tensor) -> Tensor:
    """Returns the gradient of the sinks [n]. saved: what `with_sinks` returned, and the gradient of the result."""
    dots = (saved.grad.to(saved.sums.dtype) * saved.out).sum(-1)  # [b, n, s]
    parts = (sinks.to(saved.sums.dtype)[:, None] - saved.sums).exp()
    return -(parts * dots).sum((0, 2)).to(sinks.dtype)


def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    starts: Tensor | None = None,
    view: AttentionMask | None = None,
) -> Tensor:
    """Attention to earlier keys and the sinks: [b, n, s, d]. With dropout or a bound of scores by the plain formula.

    ValueError without sinks.

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, s, d].
        v: Values [b, m, s, d].
        dropout: Dropout of the probabilities.
        starts: The first key that each query may see [b, s], or None.
        view: Has the sinks; hides further keys and adds a bias by distance, which gets a gradient.
    """
    if view is None or view.sinks is None:
        raise ValueError("attention with sinks needs the logits of sinks")
    if dropout > 0 or view.softcap is not None:
        return plain_attention(q, k, v, dropout, starts, view)
    positions = torch.arange(q.shape[2], device=q.device)
    sight = Sight(positions, positions, own=True, starts=starts, view=replace(view, sinks=None), length=q.shape[2])
    out: Tensor = _SinkAttention.apply(q, k, v, view.bias, view.sinks, sight)
    return out


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor, sight: Sight) -> Tensor:
        out, total = with_sinks(*block_forward(q, k, v, sight), sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, bias, sinks, out, total)
        ctx.sight = sight
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, None]:
        q, k, v, bias, sinks, out, total = ctx.saved_tensors
        saved = Saved(q, total, grads[0], out)
        of_bias = torch.zeros_like(bias, dtype=total.dtype) if ctx.needs_input_grad[3] else None
        found = block_backward(saved, k, v, ctx.sight, of_bias)
        return (
            found.q.to(q.dtype),
            found.k.to(k.dtype),
            found.v.to(v.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            sink_gradient(saved, sinks),
            None,
        )
