"""Small complete checkpoints, written by the parts that a run writes them with."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron.checkpoint import layout, slices
from megatron.checkpoint.publish import make_room, publish, retain
from megatron.checkpoint.slices import StateSlice
from megatron.checkpoint.snapshot import Snapshot
from megatron.checkpoint.weights import key_of, whole_content
from megatron.shapes import ModelDims, tensors

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
    kept = [StateSlice(key, 0, w.numel(), iteration, {"exp_avg": w.flatten()}) for key, w in weights.items()]
    run = {"version": 1, "counters": {"iteration": iteration}, "layout": {}}
    return Snapshot(
        {
            layout.model_file(0): lambda: whole_content(weights, {"iteration": iteration}),
            layout.slice_file(0): lambda: slices.values(kept),
        },
        {
            layout.slice_index(0): json.dumps(slices.index(kept, model_rank=0, model_size=1)),
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
