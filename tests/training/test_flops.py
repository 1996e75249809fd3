"""A run reports the FLOPs of an iteration that its plan announces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.distributed.mesh import Topology
from megatron.metrics.reporter import Reporter
from megatron.param_table import ModelDims
from megatron.plan import make_plan
from megatron.plan.flops import flops_per_iteration
from megatron.plan.parameter_counts import model_tensors
from megatron.training import trainer
from tests.config.small import resolved

LENGTH, WINDOW = 512, 64
SEEN = {
    "all": {},
    "window": {"sliding_window_width": WINDOW},
    "every other block": {"sliding_window_width": WINDOW, "attention_config": [[["global", "local"], "all"]]},
    "sparse": {"attention_config": [[["sparse_fixed"], "all"]], "sparsity_config": {"block": 16}},
}


@pytest.mark.parametrize("seen", SEEN)
def test_reports_count_what_the_plan_counts(seen: str, tmp_path: Path) -> None:
    lengths = {"seq_length": LENGTH, "max_position_embeddings": LENGTH}
    changes: dict[str, Any] = {"vocab_size": 512, "peak_theoretical_tflops": 1.0, **lengths, **SEEN[seen]}
    resolution = resolved(**changes)
    config, plan = resolution.config, make_plan(resolution)
    schedule = trainer._train_schedule(config, Topology.single(), 512, Reporter([]))
    batch = config.training.train_batch_size or 0
    assert schedule.flops(LENGTH) * batch == plan.flops_per_iteration


def test_a_window_that_a_short_sequence_does_not_fill_hides_nothing() -> None:
    changes: dict[str, Any] = {"vocab_size": 512, "peak_theoretical_tflops": 1.0, "sliding_window_width": WINDOW}
    config = resolved(**changes, seq_length=LENGTH, max_position_embeddings=LENGTH).config
    schedule = trainer._train_schedule(config, Topology.single(), 512, Reporter([]))
    dims, table = ModelDims.of(config.model, config.moe, config.mixers), model_tensors(config, 512)
    full = {length: flops_per_iteration(dims, table, seq_length=length, train_batch_size=1) for length in (32, LENGTH)}
    assert schedule.flops(32) == full[32]
    assert schedule.flops(LENGTH) < full[LENGTH]


def test_a_masked_model_counts_logits_of_predicted_tokens_alone() -> None:
    """2 blocks: 12 h^2 and 4 s h each; of 1 token in 5 a dense layer and 512 logits; a pooler for each sample."""
    changes: dict[str, Any] = {"train_impl": "bert", "pack_impl": "unpacked", "mask_prob": 0.2, "vocab_size": 512}
    plan = make_plan(resolved(**changes, make_vocab_size_divisible_by=1))
    hidden, length, samples = 64, 32, 2
    blocks = 2 * (2 * 12 * hidden**2 + 4 * length * hidden)
    heads = 2 * (round(hidden**2 * 0.2) + round(512 * hidden * 0.2)) + 2 * (hidden**2 // length + 2 * hidden // length)
    assert plan.flops_per_iteration == 3 * (blocks + heads) * length * samples
