"""Each initialisation's spread against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron.registry import INITS
from tests.model.sections import build

OUT, IN, LAYERS, HIDDEN, STD = 384, 256, 6, 256, 0.03
EXPECTED = {
    "normal": STD,
    "scaled_normal": STD / math.sqrt(12),
    "single_residual_scaled_normal": STD / math.sqrt(6),
    "small_init": math.sqrt(2 / (5 * 256)),
    "wang_init": 2 / 6 / 16,
    "xavier_uniform": math.sqrt(2 / (256 + 384)),
    "xavier_normal": math.sqrt(2 / (256 + 384)),
    "orthogonal": 1 / math.sqrt(384),
    "scaled_orthogonal": 1 / math.sqrt(384 * 12),
}


def drawn(name: str) -> Tensor:
    tensor = torch.empty(OUT, IN)
    INITS.load(name)(std=STD, num_layers=LAYERS, hidden_size=HIDDEN)(tensor, torch.Generator().manual_seed(7))
    return tensor


def test_every_initialisation_is_in_the_table() -> None:
    assert set(INITS.names) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_std_and_mean(name: str) -> None:
    tensor = drawn(name)
    assert tensor.std().item() == pytest.approx(EXPECTED[name], rel=0.01)  # 98,304 draws: 4 deviations are 0.9 %
    assert abs(tensor.mean().item()) < 0.02 * EXPECTED[name]
    assert torch.equal(tensor, drawn(name))


@pytest.mark.parametrize(("name", "length"), [("orthogonal", 1.0), ("scaled_orthogonal", 1 / 12)])
def test_orthogonal_columns(name: str, length: float) -> None:
    tensor = drawn(name)
    torch.testing.assert_close(tensor.T @ tensor, length * torch.eye(IN), rtol=0, atol=1e-5)


def test_uniform_stays_in_its_bounds() -> None:
    assert drawn("xavier_uniform").abs().max() <= math.sqrt(6 / (256 + 384))


def test_positions_past_the_size_of_the_vocabulary_start_like_the_others() -> None:
    """The rows that pad a vocabulary start from 0; a table of positions has no such rows."""
    model = build(vocabulary=16, pos_emb="learned", max_position_embeddings=64)
    rows = dict(model.named_parameters())["sequential.0.position_embeddings.weight"].detach()
    assert rows[16:].std().item() == pytest.approx(0.02, rel=0.1)
