"""The largest logit of each attention head, which fused attention does not give.

Shapes: b micro batch, n query heads, m key heads, s sequence, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 256  # [queries] of one product


@torch.no_grad()
def max_logits(q: Tensor, k: Tensor) -> Tensor:
    """Returns max of q kᵀ / sqrt(d) over the batch and all pairs of a query and an earlier key or its own, [n] in fp32.

    Keys that a window or another document hides count as well.

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, s, d]; m divides n.
    """
    batch, heads, length, size = q.shape
    groups = q.reshape(batch, k.shape[1], -1, length, size)  # [b, m, n/m, s, d]
    keys = k.unsqueeze(2).transpose(-1, -2)  # [b, m, 1, d, s]
    largest = q.new_full((heads,), float("-inf"), dtype=torch.float32)
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        scores = (groups[..., start:stop, :].float() @ keys[..., :stop].float()) * size**-0.5
        later = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).triu(start + 1)
        found = scores.masked_fill(later, float("-inf")).amax(dim=(0, 3, 4)).flatten()  # [n]
        largest = torch.maximum(largest, found)
    return largest
