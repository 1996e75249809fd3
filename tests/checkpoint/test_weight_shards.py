"""The weight files of the public layout: written at one tensor-parallel degree, read at another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.format import layout
from megatron.checkpoint.format.optimizer_shards import take_shard
from megatron.checkpoint.format.weight_shards import WeightFiles, key_of, public_biases, write_model_file
from megatron.checkpoint.load.merge_shards import read_shards
from megatron.errors import RunError
from megatron.param_table import TensorShape, tensors
from tests.checkpoint.saved import DIMS, write_layers

GROUPED = {"num_layers": 2, "num_attention_heads": 4, "head_dim": 2, "mlp_width": 12, "gated": True}
TABLE = tensors(replace(DIMS, **GROUPED), 16)


def model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {key_of(shape): torch.randn(shape.shape, generator=generator) for shape in TABLE}


def write(directory: Path, *, model_size: int, pipelined: bool, summed: bool) -> dict[str, torch.Tensor]:
    full = model()
    for rank in range(model_size):
        shards = {key_of(shape): take_shard(shape, full[key_of(shape)], rank, model_size) for shape in TABLE}
        stored = public_biases(shards, summed=summed, model_rank=rank)
        if pipelined:
            write_layers(directory, stored, rank)
        else:
            write_model_file(directory / layout.model_file(rank), stored, {"iteration": 3})
    return full


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize(("source", "target"), [(1, 2), (2, 1), (2, 2)])
def test_any_degree_reads_any_other(tmp_path: Path, pipelined: bool, summed: bool, source: int, target: int) -> None:
    full = write(tmp_path, model_size=source, pipelined=pipelined, summed=summed)
    for rank in range(target):
        stored = WeightFiles.open(tmp_path)
        found = read_shards(stored, TABLE, summed=summed, model_rank=rank, model_size=target)
        for shape in TABLE:
            assert torch.equal(found[key_of(shape)], take_shard(shape, full[key_of(shape)], rank, target)), shape


def test_public_file_and_tensor_names(tmp_path: Path) -> None:
    write(tmp_path / "piped", model_size=2, pipelined=True, summed=False)
    layer = torch.load(tmp_path / "piped" / "layer_02-model_01-model_states.pt", weights_only=True)
    assert set(layer) >= {"attention.query_key_value.weight", "mlp.linear1.weight", "input_layernorm.weight"}
    write(tmp_path / "plain", model_size=1, pipelined=False, summed=False)
    plain = torch.load(tmp_path / "plain" / "mp_rank_00_model_states.pt", weights_only=True)
    assert "sequential.6.final_linear.weight" in plain["module"]


def test_every_mismatch_is_named_at_once(tmp_path: Path) -> None:
    write(tmp_path, model_size=1, pipelined=False, summed=False)
    wider = [
        TensorShape(shape.layer, shape.name, (*shape.shape[:-1], 9), shape.shard_dim, shape.kind) for shape in TABLE
    ]
    expected = [*wider[:2], TensorShape(9, "absent.weight", (2,), None, "weight")]
    with pytest.raises(RunError) as caught:
        read_shards(WeightFiles.open(tmp_path), expected, summed=False, model_rank=0, model_size=1)
    assert len(caught.value.issues) == 3
    assert "tensor 0.word_embeddings.weight has shape [16, 8], the model's is [16, 9]" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "reported"),
    [
        (8, r"shape \[8, 8\] in each of 2 shards, the model's is \[4, 8\] there"),
        (9, r"in each of 2 shards, the model's is \[9, 8\], which 2 do not divide"),
    ],
)
def test_shards_are_compared_with_those_of_the_model(tmp_path: Path, rows: int, reported: str) -> None:
    """The stored tensor has 16 rows, 8 in a shard."""
    write(tmp_path, model_size=2, pipelined=False, summed=False)
    head = replace(TABLE[-1], shape=(rows, 8))
    with pytest.raises(RunError, match=reported):
        read_shards(WeightFiles.open(tmp_path), [head], summed=False, model_rank=0, model_size=1)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no weight files"):
        WeightFiles.open(tmp_path)


def test_what_blocks_share_is_read_once(tmp_path: Path) -> None:
    """Public files hold the table of relative positions in every block's file; ours in that of block 0."""
    table = tensors(replace(DIMS, pos_emb="rpe", rpe_buckets=6, num_layers=2), 16)
    full = {key_of(shape): torch.randn(shape.shape) for shape in table}
    copies = {**full, "3.attention.rpe.weight": full["2.attention.rpe.weight"]}
    write_layers(tmp_path, copies, 0)
    stored = WeightFiles.open(tmp_path)
    assert stored.keys() == set(full)
    found = read_shards(stored, table, summed=False, model_rank=1, model_size=2)
    assert torch.equal(found["2.attention.rpe.weight"], full["2.attention.rpe.weight"][:, 1:])
