"""Triton's masked softmax against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.kernels.triton.softmax import causal_softmax, masked_softmax
from tests.kernels.triton.compared import COLUMNS, DTYPES, TOLERANCE, random, worst

SCALE = 0.3


def formula(scores: Tensor, shown: Tensor) -> Tensor:
    """Softmax over the shown keys; rows without any are 0."""
    hidden = ~shown.expand(scores.shape)
    weights = (scores * SCALE).masked_fill(hidden, -1e30).softmax(-1)
    return weights.masked_fill(hidden, 0.0)


@pytest.mark.parametrize("keys", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_softmax(dtype: torch.dtype, keys: int) -> None:
    queries = min(keys, 3)
    scores = 5.0 * random(1, 2, queries, keys, dtype=dtype)
    shown = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    difference = worst(lambda x: causal_softmax(x, SCALE), lambda x: formula(x, shown), (scores,))
    assert difference < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(1, 1, 5, 9), (2, 1, 5, 9), (2, 3, 5, 9), (2, 1, 1, 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_softmax_of_masks_that_broadcast(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 0, :] = False  # rows that see nothing
    scores = 5.0 * random(2, 3, 5, 9, dtype=dtype)
    difference = worst(lambda x: masked_softmax(x, mask, SCALE), lambda x: formula(x, mask), (scores,))
    assert difference < 2 * TOLERANCE[dtype]
    assert masked_softmax(scores, mask, SCALE)[:, :, 0].abs().max() == 0


def test_large_scores_strided_scores_and_no_queries() -> None:
    scores = (1000.0 * random(1, 2, 4, 6, dtype=torch.float32)).transpose(-1, -2)
    shown = torch.ones(6, 4, dtype=torch.bool).tril(-2)
    assert worst(lambda x: causal_softmax(x, SCALE), lambda x: formula(x, shown), (scores,)) < 1e-5
    assert causal_softmax(torch.empty(1, 2, 0, 4), SCALE).shape == (1, 2, 0, 4)
