"""GPT-OSS: `GptOssForCausalLM`. LLaMA's blocks with sinks, a window in every second block, and experts in all.

Experts have biases, and a gated activation of bounded halves; the columns of both halves stand in turn. The router has
a bias, and its softmax is over the chosen experts. The public folders hold experts in MXFP4 (`mxfp4.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.huggingface.expert_keys import expert_misfits
from megatron.checkpoint.huggingface.expert_tables import expert_width, several
from megatron.checkpoint.huggingface.family import (
    ExpertsMapping,
    ModelFamily,
    Settings,
    TensorMapping,
    check_config,
    same,
    special_attention,
    unlike,
)
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_settings
from megatron.checkpoint.huggingface.rope_config import scaling_misfits, usual_rotary
from megatron.checkpoint.huggingface.sliding_window import (
    FULL,
    SLIDING,
    kinds_of,
    listed_kinds,
    periodic_kinds,
    typed_blocks,
    window_misfits,
    window_of,
)
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.errors import ConfigIssue
from megatron.param_table import ModelDims
from megatron.registry import LEARNABLE

ALPHA = 1.702
"""Factor of the sigmoid of quick_geglu."""
LIMIT = 7.0
"""Bound of the halves: releases of transformers before 5 have no other."""
USUAL_WINDOW = 128
USUAL_SCALING = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Scaling of positions where config.json names none."""
_OTHERS: Settings = {
    "activation": "quick_geglu",
    "activation_func_clamp_value": LIMIT,
    "glu_linear_offset": 1.0,
    "softmax_type": LEARNABLE,
}
_BIASES = {"moe_use_bias_in_experts": True, "moe_use_bias_in_router": True, "moe_router_pre_softmax": False}


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    plain = {"norm": "rmsnorm", "pos_emb": "rotary", "rotary_pct": 1.0, "gpt_j_residual": False}
    errors = unlike(model, {**plain, **_OTHERS, "use_qk_layernorm": False}, "GPT-OSS")
    return errors + special_attention(model, "GPT-OSS") + scaling_misfits(model) + window_misfits(model, "GPT-OSS")


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    found = decoder_config(model.model_copy(update={"activation": "swiglu"}), padded_vocab_size)
    return (
        {"rope_scaling": {"rope_type": "default"}}
        | found
        | {
            "attention_bias": model.use_bias_in_attn_linear,
            "sliding_window": window_of(model) or USUAL_WINDOW,
            "layer_types": kinds_of(model),
            "swiglu_alpha": ALPHA,
            "swiglu_limit": LIMIT,
        }
    )


def _settings(theirs: Mapping[str, Any]) -> Settings:
    check_config(theirs, {"swiglu_alpha": ALPHA, "swiglu_limit": LIMIT, "hidden_act": "silu"})
    kinds = listed_kinds(theirs, periodic_kinds(theirs["num_hidden_layers"], 2))
    top_k = theirs["num_experts_per_tok"]
    return (
        decoder_settings({**theirs, "mlp_bias": False}, usual_rotary(theirs, USUAL_SCALING))
        | _OTHERS
        | typed_blocks(kinds, {SLIDING: {"sliding_window_width": theirs["sliding_window"]}, FULL: {}})
        | {
            "moe_num_experts": several(theirs, "num_local_experts"),
            "moe_top_k": top_k,
            "moe_router_type": "topk",
            # theirs counts every choice of a token
            "moe_aux_loss_coeff": float(theirs["router_aux_loss_coef"] or 0.0) * top_k,
            **_BIASES,
        }
    )


def _rows(dims: ModelDims, ours: str, theirs: str) -> list[TensorMapping]:
    """The rows of a block's sinks, router and experts."""
    router, experts = f"{theirs}mlp.router", f"{theirs}mlp.experts"
    count, stack = dims.mixture.experts, f"{ours}mlp.experts.mlp."
    return [
        same(f"{ours}attention.sinks", f"{theirs}self_attn.sinks"),
        same(f"{ours}mlp.router.layer.weight", f"{router}.weight"),
        same(f"{ours}mlp.router.layer.bias", f"{router}.bias"),
        *_halves(f"{stack}w1", f"{stack}w3", f"{experts}.gate_up_proj", count),
        *_halves(f"{stack}b1", f"{stack}b3", f"{experts}.gate_up_proj_bias", count),
        _by_expert(f"{stack}w2", f"{experts}.down_proj", count),
        _by_expert(f"{stack}b2", f"{experts}.down_proj_bias", count),
    ]


def _halves(gate: str, plain: str, theirs: str, count: int) -> list[TensorMapping]:
    """Two rows of one tensor of theirs, [e, h, 2w] or [e, 2w], in whose last dimension the halves stand in turn.

    Ours are [e w, h] or [e w].
    """

    def turned(stack: Tensor) -> Tensor:
        return stack.transpose(1, 2) if stack.dim() == 3 else stack

    def joined(first: Tensor, second: Tensor) -> Sequence[Tensor]:
        parts = [part.unflatten(0, (count, -1)) for part in (first, second)]  # [e, w, ...]
        return (turned(torch.stack(parts, dim=2).flatten(1, 2)).contiguous(),)

    def half(offset: int) -> TensorMapping:
        return TensorMapping(
            (gate, plain)[offset],
            (theirs,),
            lambda tensor: (tensor,),
            lambda tensors: turned(tensors[0][..., offset::2]).flatten(0, 1),
            beside=plain if offset == 0 else "",
            joined=joined if offset == 0 else None,
            written=offset == 0,
        )

    return [half(0), half(1)]


def _by_expert(ours: str, theirs: str, count: int) -> TensorMapping:
    """Ours is theirs with the experts and their rows in one dimension."""
    return TensorMapping(
        ours,
        (theirs,),
        lambda tensor: (tensor.unflatten(0, (count, -1)),),
        lambda tensors: tensors[0].flatten(0, 1),
    )


def _expert_misfits(model: ModelSection, moe: MoeSection) -> list[ConfigIssue]:
    return expert_misfits(moe, "GPT-OSS", frozenset({"moe_ffn_hidden_size"}), **_BIASES)


def _experts_config(model: ModelSection, moe: MoeSection) -> Settings:
    """Their experts have the width that other models give their plain MLP."""
    return {
        "num_local_experts": moe.moe_num_experts,
        "num_experts_per_tok": moe.moe_top_k,
        "router_aux_loss_coef": moe.moe_aux_loss_coeff / moe.moe_top_k,
        "intermediate_size": expert_width(model, moe),
    }


GPT_OSS = ModelFamily(
    name="gpt_oss",
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=replace(NAMES, experts=_rows).table,
    spare=(".rotary_emb.inv_freq",),
    parts=frozenset({"layer_types", *(key for key in _OTHERS if key != "activation")}),
    prefix="model.",
    experts=ExpertsMapping(_expert_misfits, _experts_config),
)
