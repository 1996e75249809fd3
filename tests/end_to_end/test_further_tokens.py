"""Modules that predict further tokens on several ranks, in a pipeline that goes on from tensor parallelism too.

One process is the reference: losses, those of the modules among them, and gradient norms.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import Config
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.mesh import Topology
from tests.end_to_end import engines
from tests.end_to_end.engines import PIPELINE, SAVED, TENSOR, Curves, agree, batches, train
from tests.multi_rank import RankFailedError, run_distributed
from tests.options import Keys

CASES: dict[str, Keys] = {
    "one matrix": {"mtp_num_layers": 1},
    "own matrix, experts": {
        "mtp_num_layers": 2,
        "mtp_loss_scaling_factor": 0.5,
        "no_weight_tying": True,
        "norm": "rmsnorm",
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_router_type": "topk",
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "recomputed": {"mtp_num_layers": 1, "checkpoint_activations": True},
    "documents": {"mtp_num_layers": 2, "no_weight_tying": True, "reset_attention_mask": True},
}


def with_documents(config: Config, topology: Topology) -> list[MicroBatch]:
    """Micro batches of two documents a sample, whose first tokens have no loss."""
    found = []
    for batch in batches(config, topology):
        starts = torch.zeros_like(batch.tokens)
        starts[:, 9:] = 9
        mask = batch.loss_mask.clone()
        mask[:, :3] = 0.0
        found.append(replace(batch, document_starts=starts, loss_mask=mask))
    return found


def train_documents(rank: int, world_size: int, cases: dict[str, Keys], *more: Any) -> Curves:
    """Trains as `train`, on documents where the case keeps them apart."""
    found: Curves = {}
    for name, case in cases.items():
        engines.batches = with_documents if case.get("reset_attention_mask") else batches
        found |= train(rank, world_size, {name: case}, *more)
    return found


def run(world_size: int, layout: Keys, folder: Path | None = None, *, resumed: bool = False) -> Curves:
    position = "" if folder is None else str(folder)
    found: list[Curves] = run_distributed(train_documents, world_size, CASES, layout, position, resumed, timeout=300)
    return found[0]


def test_tensor_and_pipeline_ranks_are_one_process(tmp_path: Path) -> None:
    expected = run(1, {})
    assert all(curve[-1][0] < curve[0][0] for curve in expected.values())
    agree(run(2, TENSOR, tmp_path), expected)
    agree(run(2, PIPELINE, tmp_path, resumed=True), {name: curve[SAVED:] for name, curve in expected.items()})
    plain = {"one matrix": {key: value for key, value in CASES["one matrix"].items() if key != "mtp_num_layers"}}
    with pytest.raises(RankFailedError, match="which this run would lose"):
        run_distributed(train, 1, plain, {}, str(tmp_path), True, timeout=300)
