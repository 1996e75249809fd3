"""Weights that are written without an engine are the same wherever they waited for their turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.checkpoint.format import layout
from megatron.checkpoint.format.weight_shards import WeightFiles, key_of
from megatron.checkpoint.offline import write_resharded
from megatron.param_table import TensorShape

TABLE = [
    TensorShape(0, "word_embeddings.weight", (16, 8), 0, "word_embedding"),
    TensorShape(2, "mlp.linear1.weight", (32, 8), 0, "weight"),
    TensorShape(2, "mlp.linear2.weight", (8, 32), 1, "weight"),
    TensorShape(4, "norm.weight", (8,), None, "norm"),
]


@pytest.mark.parametrize("model_size", [1, 2])
def test_tensors_wait_in_memory_as_they_wait_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_size: int
) -> None:
    """Fails where a view takes all of its storage along, or a transposed tensor another order."""
    full = {key_of(shape): torch.randn(shape.shape[::-1]).T for shape in TABLE[:3]}
    full["4.norm.weight"] = torch.randn(100_000)[:8]
    for most in (0, 1200, 1 << 30):  # bytes: none of them in memory, some, all
        monkeypatch.setattr(write_resharded, "_IN_MEMORY", most)
        folder = tmp_path / str(most)
        folder.mkdir()
        write_resharded.write_weights(
            folder,
            TABLE,
            lambda shape: full[key_of(shape)],
            model_size=model_size,
            pipe_size=0,
            summed=False,
            facts={},
        )
        written = sorted(folder.iterdir())
        assert [path.name for path in written] == [layout.model_file(rank) for rank in range(model_size)]
        assert all(path.stat().st_size < 20_000 for path in written)
        stored = WeightFiles.open(folder)
        for shape in TABLE:
            shards = stored.shards(key_of(shape))
            assert all(shard.is_contiguous() for shard in shards)
            joined = shards[0] if shape.shard_dim is None else torch.cat(shards, shape.shard_dim)
            assert torch.equal(joined, full[key_of(shape)])
