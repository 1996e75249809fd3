"""The attention core: softmax(q kᵀ / sqrt(d)) v under a causal mask.

Keys may be longer than queries: with a key/value cache the queries are the last positions, so query i sees the keys up
to position (keys - queries + i). Fewer key/value heads than query heads means grouped queries (arXiv:2305.13245): head
i reads key/value head i // group; no kernel here copies the shared heads.

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

AttentionKernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q [b, n, s, d], k [b, m, k, d], v [b, m, k, d], dropout probability) -> [b, n, s, d]."""


def visible(queries: int, keys: int, device: torch.device) -> Tensor:
    """The causal mask [queries, keys]: True where the query sees the key; the queries are the last positions."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """The plain twin: the formula written out, with the softmax in fp32."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])  # [b, n, s, k]
    scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], q.device), float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    return weights.to(v.dtype) @ v  # [b, n, s, d]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Through torch's scaled_dot_product_attention, which picks its own backend (flash, memory-efficient or plain)."""
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if queries == keys or queries == 1:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=queries > 1, enable_gqa=grouped)
    mask = visible(queries, keys, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=grouped)


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Blocked attention where whole sequences are attended to, and torch's own for cached or dropped attention."""
    if dropout == 0 and 1 < q.shape[2] == k.shape[2]:
        return blocked_attention(q, k, v)
    return sdpa_attention(q, k, v, dropout)


def choose_attention(device: torch.device) -> AttentionKernel:
    """The fastest attention core on this device."""
    return cpu_attention if device.type == "cpu" else sdpa_attention
