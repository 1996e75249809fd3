"""Triton's permutation of tokens against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.kernels.triton.permute import combine, inverse_of, permute
from tests.kernels.triton.compared import DTYPES, TOLERANCE, random, worst


@pytest.mark.parametrize("dropped", [0, 4])
@pytest.mark.parametrize("columns", [1, 3, 127, 1000, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_tokens_go_to_their_experts_and_come_back(slots: int, dtype: torch.dtype, columns: int, dropped: int) -> None:
    tokens = random(6, columns, dtype=dtype)
    weights = random(6, slots, dtype=dtype, seed=2).abs()
    order = torch.randperm(6 * slots, generator=torch.Generator().manual_seed(0))[: 6 * slots - dropped]
    inverse = inverse_of(order, 6 * slots)
    assert worst(lambda x: permute(x, order, inverse), lambda x: x[order // slots], (tokens,)) < 2 * TOLERANCE[dtype]
    rows = random(len(order), columns, dtype=dtype, seed=3)

    def reference(rows: Tensor, weights: Tensor) -> Tensor:
        full = rows.new_zeros(weights.numel(), columns).index_copy(0, order, rows)
        return (full.view(*weights.shape, columns) * weights.unsqueeze(-1)).sum(1)

    difference = worst(lambda r, w: combine(r, w, order, inverse), reference, (rows, weights))
    assert difference < 3 * TOLERANCE[dtype]


def test_no_tokens() -> None:
    order = torch.empty(0, dtype=torch.int64)
    inverse = inverse_of(order, 0)
    assert permute(torch.empty(0, 4), order, inverse).shape == (0, 4)
    assert combine(torch.empty(0, 4), torch.empty(0, 2), order, inverse).shape == (0, 4)
