"""Nemotron-H: `NemotronHForCausalLM` (arXiv:2504.03624). Mamba-2, attention, MLPs and experts in any order, each in a
block of its own; attention without positions, activations that are not gated, experts as DeepSeek-V3 chooses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.balanced_experts import GROUP_EXPERTS, balanced_settings
from megatron.checkpoint.huggingface.expert_keys import expert_misfits
from megatron.checkpoint.huggingface.expert_tables import CONFIG, expert_width
from megatron.checkpoint.huggingface.family import (
    ExpertsMapping,
    Mixers,
    ModelFamily,
    Settings,
    TensorMapping,
    check_config,
    choose,
    fused,
    same,
    stacked,
    stacked_transposed,
    unlike,
)
from megatron.checkpoint.huggingface.mamba2 import limit_settings, mamba2_rows
from megatron.checkpoint.huggingface.plain_decoders import ACTIVATIONS, ACTIVATIONS_BACK
from megatron.config.schema.mixers import MixersSection
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.errors import ConfigError, ConfigIssue
from megatron.param_table import ModelDims
from megatron.param_table.mixer_dims import Mamba2Dims
from megatron.registry import ATTENTION_ALONE, MLP_ALONE

MAMBA2, MOE = "mamba2", "moe"
LETTERS = {"M": MAMBA2, "*": ATTENTION_ALONE, "-": MLP_ALONE, "E": MOE}
TYPES = {
    "linear_attention": MAMBA2,
    "mamba": MAMBA2,
    "full_attention": ATTENTION_ALONE,
    "attention": ATTENTION_ALONE,
    "mlp": MLP_ALONE,
    "moe": MOE,
}
"""Their kinds of blocks, by the names of each release -> ours."""
USUAL = (MAMBA2, MOE, ATTENTION_ALONE, MLP_ALONE)
"""The blocks of a file that names none."""
OLDER = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias",
}
"""Older names of keys, which count where both are given."""
UNBOUNDED = 1e-30
"""A smallest step that bounds nothing; transformers takes its logarithm."""
_FIXED: Settings = {
    "conv_kernel": 4,
    "mamba_hidden_act": "silu",
    "attention_bias": False,
    "mamba_proj_bias": False,
    "sliding_window": None,
    "hidden_dropout": 0.0,
    "moe_latent_size": None,
    "tie_word_embeddings": False,
}
"""What ours always has, by their names, or what transformers reads nowhere."""
_SHARED = "moe_shared_expert_intermediate_size"
_SAID = frozenset(
    {
        *("moe_layer_freq", "moe_expert_interval", "moe_first_k_dense_replace", "moe_ffn_hidden_size", _SHARED),
        *("moe_router_num_groups", "moe_router_topk_scaling_factor"),
    }
)


def _blocks(theirs: Mapping[str, Any]) -> list[str]:
    """Returns the kind of each block, `moe` for experts. ConfigError for other kinds, and for two that differ."""
    listed, pattern = theirs["layers_block_type"], theirs.get("hybrid_override_pattern")
    found = list(USUAL)
    if pattern is not None:
        found = _named(LETTERS, list(pattern) if isinstance(pattern, str) else pattern, "hybrid_override_pattern")
    if listed is not None:
        kinds = _named(TYPES, listed, "layers_block_type")
        if pattern is not None and kinds != found:
            what = "it contradicts hybrid_override_pattern"
            raise ConfigError.of(what, key="layers_block_type", value=listed, location=CONFIG, hint="keep one of them")
        found = kinds
    count = theirs.get("num_hidden_layers")
    if count not in (None, len(found)):
        what = f"the pattern has {len(found)} blocks"
        raise ConfigError.of(what, key="num_hidden_layers", value=count, location=CONFIG)
    return found


def _named(known: Mapping[str, str], given: Any, key: str) -> list[str]:
    if not isinstance(given, list) or not given or not all(isinstance(one, str) and one in known for one in given):
        what = f"the blocks of a pattern are {', '.join(known)}"
        raise ConfigError.of(what, key=key, value=given, location=CONFIG)
    return [known[one] for one in given]


def _kinds(model: ModelSection, moe: MoeSection) -> list[str]:
    """Returns the kind of each block, `moe` for experts."""
    listed = enumerate(map(str, model.attention_config or ()))
    return [MOE if kind == MLP_ALONE and moe.has_experts(number) else kind for number, kind in listed]


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    expected = {
        "norm": "rmsnorm",
        "pos_emb": "none",
        "use_bias_in_attn_linear": False,
        "use_qk_layernorm": False,
        "sliding_window_width": None,
        "no_weight_tying": True,
    }
    errors = unlike(model, expected, "Nemotron-H")
    others = sorted(set(map(str, model.attention_config or ())) - set(TYPES.values()))
    if others:
        what = f"a block of a Nemotron-H model is {MAMBA2}, {ATTENTION_ALONE} or {MLP_ALONE}, not {', '.join(others)}"
        errors.append(ConfigIssue(what, key="attention_config", value=others))
    if model.activation not in ACTIVATIONS:
        what = "a Nemotron-H model has an activation of transformers that is not gated"
        errors.append(ConfigIssue(what, key="activation", value=model.activation))
    return errors


def _mixer_misfits(model: ModelSection, mixers: MixersSection) -> list[ConfigIssue]:
    if MAMBA2 not in map(str, model.attention_config or ()):
        return []
    errors = unlike(mixers, {"mamba_norm_before_gate": False}, "Nemotron-H")
    if mixers.mamba_dt_limit is not None and mixers.mamba_dt_limit[1] is not None:
        what = "the steps of a Nemotron-H model have no largest one"
        errors.append(ConfigIssue(what, key="mamba_dt_limit", value=list(mixers.mamba_dt_limit)))
    return errors


def _expert_misfits(model: ModelSection, moe: MoeSection) -> list[ConfigIssue]:
    if moe.moe_num_experts == 1:
        return []
    others = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    errors = expert_misfits(moe, "Nemotron-H", _SAID, **others)
    errors += unlike(model, {"use_bias_in_mlp": False}, "Nemotron-H with experts")
    if (moe.moe_router_num_groups or 1) > 1 and moe.moe_router_group_experts != GROUP_EXPERTS:
        what = f"the score of a group is that of {GROUP_EXPERTS} experts in a Nemotron-H model"
        errors.append(ConfigIssue(what, key="moe_router_group_experts", value=moe.moe_router_group_experts))
    if not moe.moe_shared_expert_intermediate_size:
        errors.append(ConfigIssue("a Nemotron-H model with experts has shared ones", key=_SHARED, value=None))
    return errors


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return _FIXED | {
        "vocab_size": padded_vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": ModelDims.of(model).head_dim,
        "intermediate_size": model.mlp_width,
        "mlp_hidden_act": ACTIVATIONS[model.activation],
        "mlp_bias": model.use_bias_in_mlp,
        "layer_norm_epsilon": model.rms_norm_epsilon,
        "attention_dropout": model.attention_dropout,
        "max_position_embeddings": model.max_position_embeddings,
    }


def _mixer_config(model: ModelSection, mixers: MixersSection) -> Settings:
    sizes = Mamba2Dims.of(model, mixers)
    return {
        "mamba_num_heads": sizes.heads,
        "mamba_head_dim": sizes.head,
        "ssm_state_size": sizes.state,
        "n_groups": sizes.groups,
        "use_bias": mixers.mamba_use_bias_in_linears,
        "use_conv_bias": mixers.mamba_use_bias_in_conv,
        "time_step_min": sizes.limits[0] or UNBOUNDED,
    }


def _expert_config(model: ModelSection, moe: MoeSection) -> Settings:
    """The pattern of blocks by its letters, which every release reads, and the experts."""
    letters = {kind: letter for letter, kind in LETTERS.items()}
    pattern = {"hybrid_override_pattern": "".join(letters[kind] for kind in _kinds(model, moe))}
    if moe.moe_num_experts == 1:
        return pattern
    return pattern | {
        "n_routed_experts": moe.moe_num_experts,
        "num_experts_per_tok": moe.moe_top_k,
        "norm_topk_prob": moe.moe_normalize_top_k,
        "routed_scaling_factor": moe.moe_router_topk_scaling_factor,
        "n_group": moe.moe_router_num_groups or 1,
        "topk_group": moe.moe_router_group_topk or 1,
        "moe_intermediate_size": expert_width(model, moe),
        _SHARED: moe.moe_shared_expert_intermediate_size,
        "n_shared_experts": 1,
    }


def _contradictions(theirs: Mapping[str, Any]) -> list[ConfigIssue]:
    """Keys of other programs' configurations that transformers does not read, where they say something else."""
    epsilon = "layer_norm_epsilon"
    named = {"attention_head_dim": "head_dim", "rms_norm_eps": epsilon, "norm_eps": epsilon}
    errors = [
        ConfigIssue(f"transformers reads {key} = {theirs[key]!r}", key=name, value=theirs[name], location=CONFIG)
        for name, key in named.items()
        if theirs.get(name) not in (None, theirs[key])
    ]
    bounds = theirs.get("time_step_limit")
    if bounds is not None and limit_settings(bounds).get("mamba_dt_limit") not in (
        None,
        [theirs["time_step_min"], None],
    ):
        what = "transformers bounds steps by time_step_min from below and not from above, whatever this says"
        errors.append(ConfigIssue(what, key="time_step_limit", value=bounds, location=CONFIG))
    return errors


def _settings(given: Mapping[str, Any]) -> Settings:
    theirs = {**given, **{key: given[name] for name, key in OLDER.items() if name in given}}
    check_config(theirs, _FIXED)
    ConfigError.raise_any(_contradictions(theirs))
    blocks, low = _blocks(theirs), theirs["time_step_min"]
    found = {
        "num_layers": len(blocks),
        "hidden_size": theirs["hidden_size"],
        "num_attention_heads": theirs["num_attention_heads"],
        "kv_channels": theirs["head_dim"],
        "intermediate_size": theirs["intermediate_size"],
        "activation": choose(ACTIVATIONS_BACK, theirs, "mlp_hidden_act"),
        "attention_config": [MLP_ALONE if kind == MOE else kind for kind in blocks],
        "max_position_embeddings": theirs["max_position_embeddings"],
        "pos_emb": "none",
        "norm": "rmsnorm",
        "rms_norm_epsilon": float(theirs["layer_norm_epsilon"]),
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": bool(theirs["mlp_bias"]),
        "no_weight_tying": True,
    }
    if ATTENTION_ALONE in blocks:
        found["num_kv_heads"] = theirs["num_key_value_heads"] or theirs["num_attention_heads"]
    if MAMBA2 in blocks:
        found |= {
            "mamba_num_heads": theirs["mamba_num_heads"],
            "mamba_head_dim": theirs["mamba_head_dim"],
            "mamba_state_dim": theirs["ssm_state_size"],
            "mamba_num_groups": theirs["n_groups"],
            "mamba_use_bias_in_linears": bool(theirs["use_bias"]),
            "mamba_use_bias_in_conv": bool(theirs["use_conv_bias"]),
        }
        found |= {"mamba_dt_limit": [float(low), None]} if low > UNBOUNDED else {}
    return found | (_expert_settings(theirs, blocks) if MOE in blocks else {})


def _expert_settings(theirs: Mapping[str, Any], blocks: list[str]) -> Settings:
    check_config(theirs, {"n_shared_experts": 1, "mlp_bias": False})
    found = balanced_settings({**theirs, "first_k_dense_replace": 0}) | {_SHARED: theirs[_SHARED]}
    del found["moe_first_k_dense_replace"]
    return found | ({"moe_layer_freq": [int(kind == MOE) for kind in blocks]} if MLP_ALONE in blocks else {})


def _table(dims: ModelDims) -> list[TensorMapping]:
    rows = [same("0.word_embeddings.weight", "backbone.embeddings.weight")]
    for block in range(dims.num_layers):
        ours, theirs, kind = f"{block + 2}.", f"backbone.layers.{block}.", dims.kind(block)
        norm = "norm" if kind == MAMBA2 else "input_layernorm"
        rows.append(same(f"{ours}{norm}.scale", f"{theirs}norm.weight"))
        if kind == MAMBA2:
            rows += mamba2_rows(dims, ours, theirs)
        elif kind == ATTENTION_ALONE:
            names = (f"{theirs}mixer.q_proj.weight", f"{theirs}mixer.k_proj.weight", f"{theirs}mixer.v_proj.weight")
            rows.append(fused(f"{ours}attention.query_key_value.weight", names, dims))
            rows.append(same(f"{ours}attention.dense.weight", f"{theirs}mixer.o_proj.weight"))
        elif dims.has_experts(block):
            rows += _expert_rows(dims, f"{ours}mlp.", f"{theirs}mixer.")
        else:
            for value in ("weight", "bias") if dims.mlp_bias else ("weight",):
                rows.append(same(f"{ours}mlp.linear1.{value}", f"{theirs}mixer.up_proj.{value}"))
                rows.append(same(f"{ours}mlp.linear2.{value}", f"{theirs}mixer.down_proj.{value}"))
    last = dims.num_layers + 3
    rows.append(same(f"{last}.norm.scale", "backbone.norm_f.weight"))
    rows.append(same(f"{last + 1}.final_linear.weight", "lm_head.weight"))
    return rows


def _expert_rows(dims: ModelDims, ours: str, theirs: str) -> list[TensorMapping]:
    names = [f"{theirs}experts.{expert}" for expert in range(dims.mixture.experts)]
    bias = "e_score_correction_bias"
    return [
        same(f"{ours}router.layer.weight", f"{theirs}gate.weight"),
        same(f"{ours}router.{bias}", f"{theirs}gate.{bias}"),
        stacked(f"{ours}experts.mlp.w1", tuple(f"{name}.up_proj.weight" for name in names)),
        stacked_transposed(f"{ours}experts.mlp.w2", tuple(f"{name}.down_proj.weight" for name in names)),
        same(f"{ours}shared_experts.linear1.weight", f"{theirs}shared_experts.up_proj.weight"),
        same(f"{ours}shared_experts.linear2.weight", f"{theirs}shared_experts.down_proj.weight"),
    ]


NEMOTRON_H = ModelFamily(
    name="nemotron_h",
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=_table,
    prefix="backbone.",
    modules="model.",
    experts=ExpertsMapping(_expert_misfits, _expert_config),
    mixers=Mixers(frozenset({MAMBA2, MLP_ALONE}), _mixer_misfits, _mixer_config),
)
