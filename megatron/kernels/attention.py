"""The attention core: softmax(q kᵀ / sqrt(d)) v under a causal mask.

Keys may be longer than queries: with a key/value cache the queries are the last positions, so query i sees the keys up
to position (keys - queries + i). Fewer key/value heads than query heads means grouped queries (arXiv:2305.13245): head
i reads key/value head i // group; no kernel here copies the shared heads.

Where a sequence holds several documents, `starts` says for each query where its document starts; keys before that are
not seen. Without it no mask is made where the kernel needs none.

Shapes: b micro batch, n query heads, m key/value heads (n = g * m), s queries, k keys, d head dim. Inputs may be
strided views; the result is [b, n, s, d].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.blocked_attention import blocked_attention

AttentionKernel = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
"""(q [b, n, s, d], k [b, m, k, d], v [b, m, k, d], dropout probability, starts [b, s] or None) -> [b, n, s, d]."""


def visible(queries: int, keys: int, device: torch.device, starts: Tensor | None = None) -> Tensor:
    """True where the query sees the key: [queries, keys], or [b, 1, queries, keys] with starts.

    The queries are the last positions. starts [b, queries]: the first key that each query may see.
    """
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if starts is None:
        return causal
    return causal & (torch.arange(keys, device=device) >= starts[:, None, :, None])  # [b, 1, s, k]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, starts: Tensor | None = None) -> Tensor:
    """The plain twin: the formula written out, with the softmax in fp32."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])  # [b, n, s, k]
    scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], q.device, starts), float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    return weights.to(v.dtype) @ v  # [b, n, s, d]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, starts: Tensor | None = None) -> Tensor:
    """Through torch's scaled_dot_product_attention, which picks its own backend (flash, memory-efficient or plain)."""
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if starts is None and (queries == keys or queries == 1):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=queries > 1, enable_gqa=grouped)
    mask = visible(queries, keys, q.device, starts)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=grouped)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention to the keys that a mask [b, 1, s, k] shows, where the rows of a batch are of different lengths."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, starts: Tensor | None = None) -> Tensor:
    """Blocked attention where whole sequences are attended to, and torch's own for cached or dropped attention."""
    if dropout == 0 and 1 < q.shape[2] == k.shape[2]:
        return blocked_attention(q, k, v, starts)
    return sdpa_attention(q, k, v, dropout, starts)


def choose_attention(device: torch.device) -> AttentionKernel:
    """The fastest attention core on this device."""
    return cpu_attention if device.type == "cpu" else sdpa_attention
