"""Experts in the tables and configurations of families that keep them as `mlp.experts.<number>.gate_proj` and so on.

Which blocks have experts, and the numbers of the router, between our keys and config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron.checkpoint.huggingface.family import (
    Settings,
    TensorMapping,
    same,
    stacked,
    stacked_transposed,
)
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.errors import ConfigError
from megatron.param_table import ModelDims

Rows = Callable[[ModelDims, str, str], list[TensorMapping]]
CONFIG = "config.json"


def expert_rows(shared: str | None = None) -> Rows:
    """Returns the rows of a block's experts. shared: what the family calls its shared experts, if it has them."""

    def rows(dims: ModelDims, ours: str, theirs: str) -> list[TensorMapping]:
        names = [f"{theirs}mlp.experts.{expert}" for expert in range(dims.mixture.experts)]
        found = [
            same(f"{ours}mlp.router.layer.weight", f"{theirs}mlp.gate.weight"),
            stacked(f"{ours}mlp.experts.mlp.w1", tuple(f"{name}.gate_proj.weight" for name in names)),
            stacked(f"{ours}mlp.experts.mlp.w3", tuple(f"{name}.up_proj.weight" for name in names)),
            stacked_transposed(f"{ours}mlp.experts.mlp.w2", tuple(f"{name}.down_proj.weight" for name in names)),
        ]
        if dims.mixture.correction_bias:
            bias = "e_score_correction_bias"
            found.append(same(f"{ours}mlp.router.{bias}", f"{theirs}mlp.gate.{bias}"))
        if shared is not None and dims.mixture.shared_width:
            halves = (f"{theirs}mlp.{shared}.up_proj.weight", f"{theirs}mlp.{shared}.gate_proj.weight")
            found.append(stacked(f"{ours}mlp.shared_experts.linear1.weight", halves))
            found.append(same(f"{ours}mlp.shared_experts.linear2.weight", f"{theirs}mlp.{shared}.down_proj.weight"))
            if dims.mixture.shared_gate:
                found.append(same(f"{ours}mlp.shared_experts.gate.weight", f"{theirs}mlp.{shared}_gate.weight"))
        return found

    return rows


def expert_width(model: ModelSection, moe: MoeSection) -> int:
    """Returns the inner width of an expert."""
    return moe.moe_ffn_hidden_size or model.mlp_width


def dense_blocks(model: ModelSection, moe: MoeSection) -> list[int]:
    """Returns the numbers of the blocks without experts."""
    return [block for block in range(model.num_layers or 0) if not moe.has_experts(block)]


def placement(experts: Sequence[bool]) -> Settings:
    """Returns our keys for the blocks that have experts. ConfigError where none has."""
    if not any(experts):
        what = "no block has experts, so this is a dense model"
        raise ConfigError.of(what, key="mlp_only_layers", location=CONFIG, hint="name its dense family")
    first = list(experts).index(True)
    if all(experts[first:]):
        return {"moe_first_k_dense_replace": first} if first else {}
    return {"moe_layer_freq": [int(has) for has in experts]}


def router_settings(theirs: Mapping[str, Any], experts: str) -> Settings:
    """Returns our keys of a router with a softmax over all experts. experts: their key of the number of experts."""
    count, top_k = several(theirs, experts), theirs["num_experts_per_tok"]
    return {
        "moe_num_experts": count,
        "moe_top_k": top_k,
        "moe_router_type": "topk",
        "moe_normalize_top_k": bool(theirs["norm_topk_prob"]),
        # theirs counts every choice of a token
        "moe_aux_loss_coeff": float(theirs["router_aux_loss_coef"] or 0.0) * top_k,
    }


def several(theirs: Mapping[str, Any], key: str) -> int:
    """Returns the number of experts. ConfigError below 2."""
    if theirs[key] < 2:
        what = "one expert is a plain MLP, and none is a dense model"
        raise ConfigError.of(what, key=key, value=theirs[key], location=CONFIG)
    return int(theirs[key])


def router_config(moe: MoeSection) -> Settings:
    """Returns what config.json says of such a router, without the number of experts."""
    return {
        "num_experts_per_tok": moe.moe_top_k,
        "norm_topk_prob": moe.moe_normalize_top_k,
        "router_aux_loss_coef": moe.moe_aux_loss_coeff / moe.moe_top_k,
    }
