"""Optimizer state by name and range: any cut of it reads back as any other cut."""

from pathlib import Path

import pytest
import torch

from megatron.checkpoint.format.optimizer_shards import OptimizerShard, OptimizerState, join_shards, take_shard
from megatron.errors import RunError
from megatron.param_table import TensorShape
from tests.checkpoint.saved import write_slices

QKV = TensorShape(2, "attention.query_key_value.weight", (16, 3), 0, "weight", (8, 4, 4))
ROW = TensorShape(2, "mlp.linear2.weight", (3, 8), 1, "weight")
NORM = TensorShape(2, "input_layernorm.weight", (5,), None, "norm")
TABLE = {"2.attention.query_key_value.weight": QKV, "2.mlp.linear2.weight": ROW, "2.input_layernorm.weight": NORM}


def values(shape: TensorShape) -> torch.Tensor:
    """Every element different, so that a misplaced one shows."""
    return torch.arange(shape.count, dtype=torch.float32).view(shape.shape) + 0.25


def write_layout(directory: Path, *, model_size: int, data_size: int) -> None:
    """What a run of that layout would write: each data rank holds a range of every shard."""
    for model_rank in range(model_size):
        for data_rank in range(data_size):
            pieces = []
            for key, shape in TABLE.items():
                flat = take_shard(shape, values(shape), model_rank, model_size).flatten()
                bounds = [flat.numel() * i // data_size for i in range(data_size + 1)]
                start, stop = bounds[data_rank], bounds[data_rank + 1]
                pieces.append(OptimizerShard(key, start, stop, 7, {"exp_avg": flat[start:stop]}))
            rank = model_rank * data_size + data_rank
            write_slices(directory, rank, model_rank=model_rank, model_size=model_size, pieces=pieces)


@pytest.mark.parametrize(("model_size", "data_size"), [(1, 1), (1, 3), (2, 2), (4, 1)])
@pytest.mark.parametrize("target", [1, 2, 4])
def test_every_layout_reads_every_other(tmp_path: Path, model_size: int, data_size: int, target: int) -> None:
    write_layout(tmp_path, model_size=model_size, data_size=data_size)
    state = OptimizerState.open(tmp_path, TABLE)
    assert state is not None
    for key, shape in TABLE.items():
        assert state.step(key) == 7
        for rank in range(target):
            expected = take_shard(shape, values(shape), rank, target).flatten()
            found = state.shard(key, "exp_avg", model_rank=rank, model_size=target)
            assert torch.equal(found, expected), (key, rank)


def test_sections_are_cut_one_by_one() -> None:
    """A rank of a grouped-query model holds its queries, its keys, its values."""
    first = take_shard(QKV, values(QKV), 0, 2)
    rows = values(QKV)
    assert torch.equal(first, torch.cat([rows[0:4], rows[8:10], rows[12:14]]))
    assert torch.equal(join_shards(QKV, [first, take_shard(QKV, values(QKV), 1, 2)]), rows)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    write_layout(tmp_path, model_size=2, data_size=2)
    for name in ("rank_00003.pt", "rank_00003.json"):
        (tmp_path / "state" / name).unlink()
    state = OptimizerState.open(tmp_path, TABLE)
    assert state is not None
    with pytest.raises(RunError, match=r"covers \d+ of \d+ elements of 2\.attention"):
        state.shard("2.attention.query_key_value.weight", "exp_avg", model_rank=0, model_size=1)


def test_no_state_is_reported_apart(tmp_path: Path) -> None:
    assert OptimizerState.open(tmp_path, TABLE) is None
