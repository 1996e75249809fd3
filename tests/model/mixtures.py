"""Small models with experts, for tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from megatron.distributed.mesh import Topology
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.moe.layer import MoELayer
from megatron.model.moe.losses import RouterLossTracker
from tests.model.sections import VOCABULARY, initialization_section, model_section


def moe_section(**changes: object) -> Any:
    """Four experts, two a token, in every block; nothing is dropped."""
    values = {
        "moe_num_experts": 4,
        "moe_expert_interval": 1,
        "moe_top_k": 2,
        "moe_router_type": "topk",
        "moe_jitter_eps": None,
        "moe_normalize_top_k": False,
        "moe_capacity_factor": None,
        "moe_eval_capacity_factor": None,
        "moe_min_capacity": 1,
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": 0.0,
        "moe_first_k_dense_replace": 0,
        "moe_layer_freq": None,
        "moe_ffn_hidden_size": None,
        "moe_use_bias_in_experts": False,
        "moe_use_bias_in_router": False,
        "moe_shared_expert_intermediate_size": None,
        "moe_shared_expert_gate": False,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": True,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_router_group_experts": 2,
        "moe_router_topk_scaling_factor": 1.0,
        "moe_router_enable_expert_bias": False,
        "moe_router_bias_update_rate": 0.001,
        "moe_seq_aux_loss_coeff": 0.0,
        "moe_global_aux_loss_coeff": 0.0,
    }
    assert changes.keys() <= values.keys()
    return SimpleNamespace(**{**values, **changes})


def mixture(
    dtype: torch.dtype = torch.float32,
    topology: Topology | None = None,
    losses: RouterLossTracker | None = None,
    model: dict[str, object] | None = None,
    **changes: object,
) -> MoELayer:
    """The MLP of a block with experts. model: keys of the model section. changes: of the moe section."""
    plan = build_layer_specs(
        ModelSpec(
            model_section(**(model or {})),
            initialization_section(init_method_std=0.2),
            SimpleNamespace(),
            padded_vocab_size=VOCABULARY,
            topology=topology or Topology.single(),
            seed=7,
            dtype=dtype,
            device=torch.device("cpu"),
            moe=moe_section(**changes),
            router_losses=losses,
        )
    )
    made = plan[2].build().mlp
    assert isinstance(made, MoELayer)
    return made
