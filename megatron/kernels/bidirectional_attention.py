"""The attention core of an encoder: every token sees all tokens of its own document (arXiv:1810.04805).

Padding is a document of its own behind the others, so no token sees it. `starts` [b, s] says where the document of each
token starts; tokens see each other where it is the same. Without it a sequence is one document.

Shapes: b micro batch, n query heads, m key/value heads, s sequence, d head dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.attention_patterns import AttentionMask
from megatron.kernels.documents import offsets_of

SHORT = 32
"""Mean length of documents below which one call under a mask is faster than a call for each [tokens]."""


def bidirectional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    starts: Tensor | None = None,
    view: AttentionMask | None = None,
) -> Tensor:
    """Torch's scaled_dot_product_attention, under a mask where there are several documents.

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, s, d].
        v: Values [b, m, s, d].
        dropout: Dropout of the probabilities.
        starts: Start of the document of each token [b, s].
        view: None: an encoder has no further mask or bias.
    """
    assert view is None, "an encoder has no mask besides that of documents"
    mask = None if starts is None else starts[:, None, :, None] == starts[:, None, None, :]  # [b, 1, s, s]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    starts: Tensor | None = None,
    view: AttentionMask | None = None,
) -> Tensor:
    """The same, one document after another, so that hidden keys cost nothing. The host reads where documents start.

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, s, d].
        v: Values [b, m, s, d].
        dropout: Dropout of the probabilities.
        starts: Start of the document of each token [b, s].
        view: None: an encoder has no further mask or bias.
    """
    batch, length = q.shape[0], q.shape[2]
    if starts is None:
        return bidirectional_attention(q, k, v, dropout, None, view)
    offsets = offsets_of(starts).offsets.tolist()
    if batch * length < SHORT * (len(offsets) - 1):
        return bidirectional_attention(q, k, v, dropout, starts, view)
    rows: list[list[Tensor]] = [[] for _ in range(batch)]
    for begin, end in pairwise(offsets):
        row, first = divmod(begin, length)
        own = slice(first, first + end - begin)
        part = slice(row, row + 1), slice(None), own
        rows[row].append(bidirectional_attention(q[part], k[part], v[part], dropout))
    return torch.cat([torch.cat(row, dim=2) for row in rows])  # [b, n, s, d]
