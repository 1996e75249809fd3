"""Qwen3.5, its text models: `Qwen3_5ForCausalLM`, `Qwen3_5MoeForCausalLM`.

Qwen3-Next's blocks, with an MLP or experts in all of them. The projections of a gated delta net are four matrices, and
ours is these on top of each other. Rotary positions of text are the same in all three dimensions of the public models,
so that `mrope_section` changes nothing. Folders of the models with images are of another type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.huggingface.expert_tables import expert_width
from megatron.checkpoint.huggingface.family import ExpertsMapping, ModelFamily, Settings, TensorMapping
from megatron.checkpoint.huggingface.qwen3_next import (
    GATED_NAMES,
    MIXERS,
    gated_config,
    gated_misfits,
    gated_settings,
    mixer_rows,
    shared_misfits,
    shared_settings,
)
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.param_table import DeltaDims


def _projection(ours: str, net: str, sizes: DeltaDims) -> TensorMapping:
    """Ours is theirs on top of each other: queries, keys and values; gates; strengths; decays.

    Args:
        ours: Our name.
        net: What their names begin with.
        sizes: Of the gated delta net.
    """
    names = tuple(f"{net}in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))
    widths = (sum(sizes.mixed), *sizes.projected[3:])

    def together(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(tensors))

    return TensorMapping(ours, names, lambda tensor: tensor.split(widths), together)


def _moe_settings(theirs: Mapping[str, Any]) -> Settings:
    """Their plain MLP has no width, as no block has one; their weights of experts always sum to 1."""
    width = theirs["moe_intermediate_size"]
    return gated_settings({**theirs, "intermediate_size": width}) | shared_settings({**theirs, "norm_topk_prob": True})


def _moe_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    found = gated_config(model, padded_vocab_size)
    del found["intermediate_size"]
    return found


def _experts_config(model: ModelSection, moe: MoeSection) -> Settings:
    return {
        "num_experts": moe.moe_num_experts,
        "num_experts_per_tok": moe.moe_top_k,
        "moe_intermediate_size": expert_width(model, moe),
        "shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
        "router_aux_loss_coef": moe.moe_aux_loss_coeff / moe.moe_top_k,
    }


_NAMES = replace(GATED_NAMES, mixer=mixer_rows(_projection))
_FREE = frozenset({"moe_ffn_hidden_size"})
QWEN3_5 = ModelFamily(
    name="qwen3_5",
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    misfits=lambda model: gated_misfits(model, "Qwen3.5"),
    config=gated_config,
    settings=gated_settings,
    table=_NAMES.table,
    spare=(".rotary_emb.inv_freq",),
    spare_modules=("mtp.", "model.visual."),
    parts=frozenset({"attention_output_gate"}),
    prefix="model.",
    mixers=MIXERS,
)
QWEN3_5_MOE = ModelFamily(
    name="qwen3_5_moe",
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    misfits=lambda model: gated_misfits(model, "Qwen3.5-MoE"),
    config=_moe_config,
    settings=_moe_settings,
    table=_NAMES.table,
    spare=(".rotary_emb.inv_freq",),
    spare_modules=("mtp.", "model.visual."),
    parts=frozenset({"attention_output_gate"}),
    prefix="model.",
    experts=ExpertsMapping(
        lambda model, moe: shared_misfits(moe, "Qwen3.5-MoE", _FREE, moe_normalize_top_k=True), _experts_config
    ),
    mixers=MIXERS,
)
