"""A cache holds what each row stored, in a higher precision than the model's too; compared with plain concatenation."""

from __future__ import annotations

import pytest
import torch

from megatron.model.kv_cache import KVCache


@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[3, 3], [1, 4]])
def test_rows_go_on_where_each_of_them_ends(model: torch.dtype, lengths: list[int]) -> None:
    """Fails when rows of different lengths store keys at the same place, or cannot take the model's type."""
    cache = KVCache(num_layers=1, batch=2, kv_heads=2, max_length=8, head_dim=4, dtype=torch.float32)
    before = torch.randn(2, 2, 2, 4, 4).to(model)  # [keys and values, b, m, s, d]
    cache.update(0, *before)
    cache.set_lengths(lengths)
    new = torch.randn(2, 2, 2, 1, 4).to(model)
    keys, values = cache.update(0, *new)
    for row, length in enumerate(lengths):
        for stored, old, added in zip((keys, values), before, new, strict=True):
            expected = torch.cat([old[row, :, :length], added[row]], dim=1).float()  # [m, s, d]
            assert torch.equal(stored[row, :, : length + 1], expected)
