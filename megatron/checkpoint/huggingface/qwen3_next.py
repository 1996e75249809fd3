"""Qwen3-Next: `Qwen3NextForCausalLM`. Gated delta nets in place of attention in three blocks of four, experts in any.

Attention has an output gate, whose rows stand in the matrix of queries, head by head. The two projections of a gated
delta net stand key head by key head; ours is one, all queries first. Norms have the factor 1 + weight, but for those of
the delta net's heads. The modules that predict further tokens (`mtp.`) are left out, as transformers leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.huggingface.expert_keys import expert_misfits
from megatron.checkpoint.huggingface.expert_tables import expert_rows, placement, router_settings
from megatron.checkpoint.huggingface.family import (
    ExpertsMapping,
    Mixers,
    ModelFamily,
    Settings,
    TensorMapping,
    check_config,
    queries_keys_values,
    query_key_value,
    same,
)
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_misfits, decoder_settings
from megatron.checkpoint.huggingface.qwen import HEAD_NORMS
from megatron.checkpoint.huggingface.qwen_moe import SAID, SHARED, sparse_blocks, sparse_config
from megatron.checkpoint.huggingface.rope_config import rotary_settings
from megatron.checkpoint.huggingface.sliding_window import FULL
from megatron.config.schema.mixers import MixersSection
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.errors import ConfigError, ConfigIssue
from megatron.param_table import DeltaDims, ModelDims
from megatron.registry import GATED_DELTA_NET

Projection = Callable[[str, str, DeltaDims], TensorMapping]
LINEAR = "linear_attention"
USUAL_PERIOD = 4
"""Every block of this number has attention where config.json does not list the kinds."""
SIZES = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    "linear_conv_kernel_dim",
)
"""Names of the sizes of gated delta nets, which are the same here and there."""
_OTHERS: Settings = {
    "norm": "rmsnorm_1p",
    "use_qk_layernorm": True,
    "attention_output_gate": True,
}


def gated_misfits(model: ModelSection, family: str) -> list[ConfigIssue]:
    """Returns what of a model a family with such blocks cannot say. family: its name, for messages."""
    attending = [kind for kind in model.attention_config or () if kind != GATED_DELTA_NET]
    given = model.model_copy(update={"attention_config": attending})
    others = {**_OTHERS, "activation": "swiglu", "sliding_window_width": None, "use_bias_in_mlp": False}
    return decoder_misfits(given, family, **others, rotary_pct=model.rotary_pct)


def gated_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    """Returns what config.json says of such blocks."""
    kinds = map(str, model.attention_config or ())
    return decoder_config(model, padded_vocab_size) | {
        "attention_bias": model.use_bias_in_attn_linear,
        "partial_rotary_factor": model.rotary_pct,
        "layer_types": [LINEAR if kind == GATED_DELTA_NET else FULL for kind in kinds],
    }


def gated_settings(theirs: Mapping[str, Any]) -> Settings:
    """Returns our keys of such blocks."""
    check_config(theirs, {"hidden_act": "silu"})
    rotary = rotary_settings(theirs, base="rope_theta")
    kinds = [GATED_DELTA_NET if kind == LINEAR else "global" for kind in _kinds(theirs)]
    sizes = {name: theirs[name] for name in SIZES}
    return decoder_settings({**theirs, "mlp_bias": False}, rotary) | _OTHERS | {"attention_config": kinds} | sizes


def shared_settings(theirs: Mapping[str, Any]) -> Settings:
    """Returns our keys of experts with shared ones beside them."""
    return router_settings(theirs, "num_experts") | {
        "moe_ffn_hidden_size": theirs["moe_intermediate_size"],
        SHARED: theirs["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": True,
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    return gated_settings(theirs) | shared_settings(theirs) | placement(sparse_blocks(theirs))


def _kinds(theirs: Mapping[str, Any]) -> list[str]:
    """Returns the kind of each block; a list of them goes before a period. ConfigError for others."""
    layers, found, period = (
        theirs["num_hidden_layers"],
        theirs["layer_types"],
        theirs["full_attention_interval"] or USUAL_PERIOD,
    )
    if found is None:
        if period < 1:
            what = "it must be at least 1"
            raise ConfigError.of(what, key="full_attention_interval", value=period, location="config.json")
        return [LINEAR if (layer + 1) % period else FULL for layer in range(layers)]
    if len(found) != layers or set(found) - {FULL, LINEAR}:
        what = f"only one of {FULL} and {LINEAR} for each of {layers} layers can be taken over"
        raise ConfigError.of(what, key="layer_types", value=found, location="config.json")
    return list(found)


def mixer_rows(projection: Projection) -> Callable[[ModelDims, int, str, str], list[TensorMapping] | None]:
    """Returns what gives the rows of a gated delta net, and None for a block with attention.

    projection: (our name, begin of theirs, sizes) -> the row of the projection of the input.
    """
    names = {
        "A_log": "A_log",
        "dt_bias": "dt_bias",
        "conv1d.weight": "conv1d.weight",
        "norm.scale": "norm.weight",
        "dense.weight": "out_proj.weight",
    }

    def rows(dims: ModelDims, number: int, ours: str, theirs: str) -> list[TensorMapping] | None:
        if dims.kind(number) != GATED_DELTA_NET:
            return None
        own, net = f"{ours}attention.", f"{theirs}linear_attn."
        found = [same(f"{own}{mine}", f"{net}{other}") for mine, other in names.items()]
        return [*found, projection(f"{own}in_proj.weight", net, dims.mixers.delta)]

    return rows


def _by_key_head(ours: str, net: str, sizes: DeltaDims) -> TensorMapping:
    """Ours has all queries, keys, values, gates, strengths and decays; theirs those of each key head together.

    Args:
        ours: Our name.
        net: What their names begin with: of the first four, and of the last two.
        sizes: Of the gated delta net.
    """
    theirs = (f"{net}in_proj_qkvz.weight", f"{net}in_proj_ba.weight")
    heads = sizes.key_heads
    widths = [width // heads for width in sizes.projected]

    def apart(tensor: Tensor) -> Sequence[Tensor]:
        parts = [part.unflatten(0, (heads, -1)) for part in tensor.split(sizes.projected)]
        return torch.cat(parts[:4], 1).flatten(0, 1), torch.cat(parts[4:], 1).flatten(0, 1)

    def together(tensors: Sequence[Tensor]) -> Tensor:
        first, second = (tensor.unflatten(0, (heads, -1)) for tensor in tensors)
        parts = (*first.split(widths[:4], 1), *second.split(widths[4:], 1))
        return torch.cat([part.flatten(0, 1) for part in parts])

    return TensorMapping(ours, theirs, apart, together)


def _attention(dims: ModelDims, ours: str, theirs: str) -> list[TensorMapping]:
    """The rows of queries, keys, values and output gates, whose rows stand behind the queries of each head."""
    rows = []
    for kind in ("weight", "bias") if dims.has_qkv_bias else ("weight",):
        names = {name: f"{theirs}self_attn.{name}_proj.{kind}" for name in "qkv"}
        rows += _gated_queries(
            f"{ours}attention.query_key_value.{kind}", f"{ours}attention.output_gate.{kind}", names, dims
        )
    return rows


def _gated_queries(joint: str, gate: str, theirs: Mapping[str, str], dims: ModelDims) -> list[TensorMapping]:
    """The rows of our joint projection and of our gate.

    Args:
        joint: Our name of the former.
        gate: Our name of the latter.
        theirs: Their names of queries with gates, of keys and of values, by `q`, `k` and `v`.
        dims: Sizes of the model.
    """
    heads = dims.num_attention_heads

    def halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
        queries, gates = tensor.unflatten(0, (heads, 2, -1)).unbind(1)
        return queries.flatten(0, 1), gates.flatten(0, 1)

    def joined(rows: Tensor, gates: Tensor) -> Sequence[Tensor]:
        queries, keys, values = queries_keys_values(rows, dims)
        both = torch.stack([part.unflatten(0, (heads, -1)) for part in (queries, gates)], 1)
        return both.flatten(0, 2), keys, values

    def together(tensors: Sequence[Tensor]) -> Tensor:
        return query_key_value((halves(tensors[0])[0], *tensors[1:]), dims)

    names = (theirs["q"], theirs["k"], theirs["v"])
    return [
        TensorMapping(joint, names, lambda tensor: (tensor,), together, beside=gate, joined=joined),
        TensorMapping(gate, names[:1], lambda tensor: (tensor,), lambda tensors: halves(tensors[0])[1], written=False),
    ]


def _mixer_config(model: ModelSection, mixers: MixersSection) -> Settings:
    return {name: getattr(mixers, name) for name in SIZES}


def shared_misfits(moe: MoeSection, family: str, free: frozenset[str], **others: object) -> list[ConfigIssue]:
    """Returns what of a moe section a family with gated shared experts cannot say.

    Args:
        moe: The moe section.
        family: Its name, for messages.
        free: Keys whose value its configuration says.
        others: Keys of which it has one value.
    """
    errors = expert_misfits(moe, family, free | {SHARED}, moe_shared_expert_gate=True, **others)
    if moe.moe_shared_expert_intermediate_size is None:
        errors.append(ConfigIssue(f"a {family} model has shared experts", key=SHARED))
    return errors


def _experts_config(model: ModelSection, moe: MoeSection) -> Settings:
    return sparse_config(model, moe) | {
        "num_experts": moe.moe_num_experts,
        "shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
    }


GATED_NAMES = replace(NAMES, head_norms=HEAD_NORMS, projections=_attention, experts=expert_rows("shared_expert"))
MIXERS = Mixers(frozenset({GATED_DELTA_NET}), lambda model, mixers: [], _mixer_config)
QWEN3_NEXT = ModelFamily(
    name="qwen3_next",
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    misfits=lambda model: gated_misfits(model, "Qwen3-Next"),
    config=gated_config,
    settings=_settings,
    table=replace(GATED_NAMES, mixer=mixer_rows(_by_key_head)).table,
    spare=(".rotary_emb.inv_freq",),
    spare_modules=("mtp.",),
    parts=frozenset({"attention_output_gate"}),
    prefix="model.",
    experts=ExpertsMapping(lambda model, moe: shared_misfits(moe, "Qwen3-Next", SAID), _experts_config),
    mixers=MIXERS,
)
