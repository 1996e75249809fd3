"""Attention as product, fused scale, mask and softmax, dropout, product (Megatron's FusedScaleMaskSoftmax).

The scores [b, n, s, k] are in memory, in the type of the queries; the softmax is computed in fp32 by Triton's kernel,
without a mask tensor where only the causal mask hides keys. The keys `scaled_upper_triang_masked_softmax_fusion` and
`scaled_masked_softmax_fusion` ask for it. Reference: plain_attention.

Shapes: b micro batch, n query heads, m key/value heads (n = g * m), s queries, k keys, d head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.attention import visible
from megatron.kernels.attention_patterns import AttentionMask
from megatron.kernels.triton.softmax import causal_softmax, masked_softmax


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    starts: Tensor | None = None,
    view: AttentionMask | None = None,
) -> Tensor:
    """Attention whose probabilities are made by one launch, [b, n, s, d].

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, keys, d].
        v: Values [b, m, keys, d].
        dropout: Dropout of the probabilities.
        starts: The first key that each query may see, [b, s].
        view: Mask besides the causal one.
    """
    batch, heads, queries, size = q.shape
    kv_heads, keys = k.shape[1:3]
    rows = q.reshape(batch * kv_heads, -1, size)  # [b m, g s, d]
    columns, values = (x.reshape(batch * kv_heads, keys, -1) for x in (k, v))  # [b m, k, d]
    shape = (batch, heads, queries, keys)
    # scaled inside the product, in fp32, so that fp16 scores do not overflow
    blank = rows.new_zeros(1).expand(len(rows), rows.shape[1], keys)
    scores = torch.baddbmm(blank, rows, columns.transpose(1, 2), beta=0.0, alpha=1 / math.sqrt(size)).view(shape)
    scores = scores if view is None else view.capped(scores)
    if view is not None and view.bias is not None:
        scores = scores.float() + _bias(view.bias, queries, keys)
    if starts is None and (view is None or view.pattern is None):
        weights = causal_softmax(scores, 1.0)
    else:
        shown = visible(queries, keys, q.device, starts, view)  # [b or 1, n or 1, s, k], or fewer dimensions
        weights = masked_softmax(scores, shown, 1.0)
    weights = F.dropout(weights.to(v.dtype), dropout, training=dropout > 0)
    return (weights.view(batch * kv_heads, -1, keys) @ values).view(batch, heads, queries, -1)


def _bias(bias: Tensor, queries: int, keys: int) -> Tensor:
    """Returns the bias of every query and key, fp32 [n, s, k]. bias: by distance [n, distances]."""
    positions = torch.arange(keys, device=bias.device)
    distance = (positions[keys - queries :, None] - positions).clamp(min=0)
    return bias.float()[:, distance]
