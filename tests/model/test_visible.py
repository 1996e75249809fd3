"""The exact set of positions that each kind of attention sees in a sequence of 64, against visible_positions.txt.

The file was written from DeepSpeed's own layout classes (release 0.14) and, for the other kinds, from their definition.
What is seen is read off the attention of a built model: queries of 0 weigh all seen keys alike, and unit vectors as
values say which keys these are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.block_sparsity import SPARSE_KINDS
from megatron.kernels.attention import masked_attention
from megatron.model.attention.self_attention import visible_mask
from megatron.model.kv_cache import CacheSlots
from tests.model.sections import build

LENGTH = 64
KINDS: dict[str, dict[str, Any]] = {
    "global": {},
    "flash": {"attention_config": ("flash",)},
    "sliding_window": {"sliding_window_width": 12},
    "local": {"sparsity_config": {"block": 8, "num_local_blocks": 2}},
    "sparse_fixed": {"sparsity_config": {"block": 8, "num_local_blocks": 3}},
    "sparse_variable": {
        "sparsity_config": {"block": 8, "local_window_blocks": [1, 2], "global_block_indices": [2]},
    },
    "bigbird": {"sparsity_config": {"block": 8, "num_random_blocks": 0}},
    "bslongformer": {"sparsity_config": {"block": 8, "global_block_indices": [0, 4]}},
}
Rows = list[list[int]]


def written(kind: str) -> Rows:
    """The positions that each of 64 tokens sees, as the file has them."""
    lines = (Path(__file__).parent / "visible_positions.txt").read_text(encoding="utf-8").splitlines()
    start = lines.index(kind) + 1
    rows = []
    for line in lines[start : start + LENGTH]:
        parts = [part.split("-") for part in line.split(":")[1].split()]
        rows.append([position for part in parts for position in range(int(part[0]), int(part[-1]) + 1)])
    return rows


def attention_of(kind: str) -> Any:
    changes = dict(KINDS[kind])
    if kind in SPARSE_KINDS:
        changes["attention_config"] = (kind,)
    return build(num_layers=1, **changes).sequential[2].attention


def seen(weights: Tensor) -> Rows:
    return [row.nonzero().flatten().tolist() for row in weights]


def test_every_kind_is_written_down() -> None:
    assert set(SPARSE_KINDS) < KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_kind_sees(kind: str) -> None:
    """Fails when a layout, a window or a kernel shows one position too many or too few."""
    attention = attention_of(kind)
    q = torch.zeros(1, 4, LENGTH, LENGTH)
    v = torch.eye(LENGTH).expand(1, 4, LENGTH, LENGTH)
    weights = attention.attend(q, q, v, 0.0, None, attention.view(LENGTH, q.device))[0]  # [n, s, s]
    for head in weights:
        assert seen(head) == written(kind)
        counts = torch.tensor([len(row) for row in written(kind)], dtype=torch.float32)
        torch.testing.assert_close(head, (head > 0) / counts[:, None], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_kind_sees_in_a_cache(kind: str) -> None:
    """Token by token, in two rows of which one is 20 tokens behind."""
    attention = attention_of(kind)
    v = torch.eye(LENGTH).expand(2, 4, LENGTH, LENGTH)
    for end in range(21, LENGTH + 1, 7):
        positions = torch.tensor([[end - 1], [end - 21]])
        view = attention.view(end, v.device)
        mask = torch.arange(end) <= positions[:, None, :, None] if view is None else None
        if view is not None:
            mask = visible_mask(view, CacheSlots(end, positions), 1, v.device)
        assert mask is not None
        weights = masked_attention(torch.zeros(2, 4, 1, LENGTH), torch.zeros(2, 4, end, LENGTH), v[:, :, :end], mask)
        for row, position in enumerate((end - 1, end - 21)):
            assert seen(weights[row, 0]) == [written(kind)[position]]
