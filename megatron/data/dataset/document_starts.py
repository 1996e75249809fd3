"""Where documents start in a sequence, for attention and positions that are reset there.

Attention reads it as the first key that each query may see (`kernels/attention.py`), positions count from it
(`model/positions/base.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(tokens: Tensor, borders: Tensor, eod: int | None) -> Tensor:
    """The position at which the document of each token starts, int64 [b, s].

    A document starts at a border, after an eod (None: nowhere else) and at the sequence's start. tokens int64 and
    borders bool, [b, s].
    """
    first = borders.clone()
    if eod is not None:
        first[:, 1:] |= tokens[:, :-1] == eod
    first[:, 0] = True
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return torch.where(first, positions, 0).cummax(dim=1).values
