"""Small complete checkpoints, written by the parts that a run writes them with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron.checkpoint.format import files, layout, optimizer_shards
from megatron.checkpoint.format.optimizer_shards import OptimizerShard
from megatron.checkpoint.format.weight_shards import by_layer, key_of, layer_content, model_file_content
from megatron.checkpoint.save.commit import make_room, publish, retain
from megatron.checkpoint.save.snapshot import Snapshot
from megatron.param_table import ModelDims, tensors

DIMS = ModelDims(
    num_layers=1,
    hidden_size=8,
    num_attention_heads=2,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=16,
    pos_emb="rotary",
    tied=False,
)
TABLE = tensors(DIMS, 16)


def snapshot(iteration: int) -> Snapshot:
    """What the one rank of a run has to write after that iteration; every number in it is the iteration."""
    weights = {key_of(shape): torch.full(shape.shape, float(iteration)) for shape in TABLE}
    retained = [OptimizerShard(key, 0, w.numel(), iteration, {"exp_avg": w.flatten()}) for key, w in weights.items()]
    run = {"version": 1, "counters": {"iteration": iteration}, "layout": {}}
    return Snapshot(
        {
            layout.model_file(0): lambda: model_file_content(weights, {"iteration": iteration}),
            layout.slice_file(0): lambda: optimizer_shards.values(retained),
        },
        {
            layout.slice_index(0): json.dumps(optimizer_shards.index(retained, model_rank=0, model_size=1)),
            layout.RUN: json.dumps(run),
        },
    )


def save(folder: Path, iteration: int, keep: int | None = None) -> Path:
    """Writes the checkpoint of that iteration as a run does; returns its folder."""
    partial, final = layout.partial_directory(folder, iteration), layout.step_directory(folder, iteration)
    make_room(partial)
    publish(partial, final, list(snapshot(iteration).write(partial)))
    retain(folder, keep, newest=iteration, loaded=None)
    return final


def write_layers(directory: Path, weights: dict[str, torch.Tensor], model_rank: int) -> None:
    """The weights of a tensor-parallel rank of a pipelined run, one file a layer."""
    for layer, content in by_layer(weights).items():
        files.write_tensors(directory / layout.layer_file(layer, model_rank), layer_content(content))


def write_slices(
    directory: Path, rank: int, *, model_rank: int, model_size: int, pieces: Sequence[OptimizerShard]
) -> None:
    """The optimizer slices of one global rank, and their index."""
    files.write_tensors(directory / layout.slice_file(rank), optimizer_shards.values(pieces))
    files.write_json(
        directory / layout.slice_index(rank),
        optimizer_shards.index(pieces, model_rank=model_rank, model_size=model_size),
    )
