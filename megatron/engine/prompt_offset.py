"""Positions of a soft prompt: callers of an engine count their own tokens only.

n vectors of the prompt, b batch, s sequence, v vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron.model.kv_cache import KVCache


def prompt_offset(length: int, cache: KVCache | None) -> int:
    """Returns the number of prompt positions before these tokens: n, or 0 if the cache contains the prompt."""
    return length if cache is None or cache.length == 0 else 0


def prepend_padding(tokens: Tensor, offset: int) -> Tensor:
    """Pads tokens [b, s] at the start; the embedding replaces these vectors: [b, offset + s]."""
    return F.pad(tokens, (offset, 0)) if offset else tokens


def shift_positions(at: Tensor | None, length: int, offset: int) -> Tensor | None:
    """Shifts positions of the flattened [b, s] to the flattened [b, places + s]; s is `length`."""
    return at if at is None or not offset else at + (at // length + 1) * offset
