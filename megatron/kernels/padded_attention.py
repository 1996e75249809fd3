"""Attention of queries to all keys that are not padding: of an encoder to itself, of a decoder to an encoder.

Shapes: b micro batch, n query heads, m key/value heads, s queries, k keys, d head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.bidirectional_attention import bidirectional_attention, document_attention


def encoder_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    starts: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of an encoder's tokens to each other; padding is a document behind the first one.

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, s, d].
        v: Values [b, m, s, d].
        dropout: Dropout of the probabilities.
        starts: Start of the document of each token [b, s]; None without padding.
        bias: Added to the scores, fp32 [n, s, s].
    """
    if bias is not None:
        return attention_to(q, k, v, dropout, None if starts is None else starts == 0, bias)
    core = document_attention if q.device.type == "cpu" else bidirectional_attention
    return core(q, k, v, dropout, starts)


def attention_to(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    shown: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of every query to the shown keys -> [b, n, s, d]. With a bias scores and softmax are in fp32.

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, k, d].
        v: Values [b, m, k, d].
        dropout: Dropout of the probabilities.
        shown: Keys that are not padding, bool [b, k]; None without padding.
        bias: Added to the scores, fp32 [n, s, k].
    """
    mask = None if shown is None else shown[:, None, None]  # [b, 1, 1, k]
    group = q.shape[1] // k.shape[1]
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=group > 1)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q * (1 / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)).float() + bias  # [b, n, s, k]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    return weights.to(v.dtype) @ v
