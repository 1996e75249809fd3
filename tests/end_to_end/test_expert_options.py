"""Shared experts, groups, biases and balance in every layout: losses and gradient norms are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.engines import CONTEXT, PIPELINE, SAVED, TENSOR, Curves, agree, train
from tests.multi_rank import run_distributed
from tests.options import Keys

SMALL: Keys = {
    "activation": "swiglu",
    "use_bias_in_mlp": False,
    "moe_num_experts": 8,
    "moe_router_type": "topk",
    "moe_ffn_hidden_size": 24,
    "mlp_multiple_of": 8,
}
CASES: dict[str, Keys] = {
    "sigmoid, groups, bias, shared, first dense": {
        **SMALL,
        "moe_top_k": 3,
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.05,
        "moe_normalize_top_k": True,
        "moe_shared_expert_intermediate_size": 40,
        "moe_first_k_dense_replace": 1,
        "moe_seq_aux_loss_coeff": 0.05,
    },
    "gated shared, biases, late softmax, global batch": {
        **SMALL,
        "moe_top_k": 2,
        "moe_router_pre_softmax": False,
        "moe_use_bias_in_experts": True,
        "moe_shared_expert_intermediate_size": 40,
        "moe_shared_expert_gate": True,
        "moe_global_aux_loss_coeff": 0.05,
        "gpt_j_residual": True,
    },
}
EXPERTS: Keys = {"moe_expert_parallel_size": 2}
ACCUMULATED: Keys = {"gradient_accumulation_steps": 2}
LAYOUTS: dict[str, tuple[int, Keys]] = {
    "tensor 2, sequence": (2, TENSOR),
    "tensor 2": (2, {"model_parallel_size": 2}),
    "pipeline 2": (2, PIPELINE),
    "data 2, experts 2, ZeRO 1": (2, {**EXPERTS, "zero_optimization": {"stage": 1}}),
    "context 2, ZeRO 3": (2, CONTEXT),
    "experts 2, ZeRO 2, recomputed": (
        2,
        {**EXPERTS, "zero_optimization": {"stage": 2}, "checkpoint_activations": True},
    ),
}


@pytest.fixture(scope="module")
def alone() -> dict[bool, Curves]:
    """By whether gradients are accumulated, which the balance of the global batch depends on."""
    return {more: run_distributed(train, 1, CASES, ACCUMULATED if more else {})[0] for more in (False, True)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_compute_what_one_process_does(layout: str, alone: dict[bool, Curves]) -> None:
    world, keys = LAYOUTS[layout]
    for found in run_distributed(train, world, CASES, keys):
        agree(found, alone["gradient_accumulation_steps" in keys])


def test_a_checkpoint_continues_anywhere(tmp_path: Path) -> None:
    """Two tensor-parallel ranks save; experts over two ranks, two stages, and one process go on."""
    full = run_distributed(train, 2, CASES, TENSOR, str(tmp_path))[0]
    rest = {name: curve[SAVED:] for name, curve in full.items()}
    for world, keys in ((2, TENSOR), (2, {**EXPERTS, "zero_optimization": {"stage": 1}}), (1, {})):
        agree(run_distributed(train, world, CASES, keys, str(tmp_path), True)[0], rest)
