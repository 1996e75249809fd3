"""The places of a learned prompt in what an engine is asked: callers speak of their own tokens only.

n vectors of the prompt, b batch, s sequence, v vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron.model.kv_cache import KVCache


def prompt_offset(length: int, cache: KVCache | None) -> int:
    """How many places the prompt takes before these tokens: all of its n, or none where the cache has it already."""
    return length if cache is None or cache.length == 0 else 0


def behind(tokens: Tensor, places: int) -> Tensor:
    """Tokens [b, s] behind so many places, whose vectors the embedding replaces: [b, places + s]."""
    return F.pad(tokens, (places, 0)) if places else tokens


def shifted(at: Tensor | None, length: int, places: int) -> Tensor | None:
    """Places of the flattened [b, s], s being `length`, in the flattened [b, places + s]."""
    return at if at is None or not places else at + (at // length + 1) * places
