"""LLaMA and its kin: `LlamaForCausalLM`, `MistralForCausalLM`, `MixtralForCausalLM`; others build on their tables.

They keep query, key and value apart, and the two halves of the gated MLP; ours are fused, the plain half first. They
keep every expert apart; ours are stacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.expert_keys import expert_misfits
from megatron.checkpoint.huggingface.family import (
    ExpertsMapping,
    ModelFamily,
    Settings,
    TensorMapping,
    check_config,
    choose,
    same,
    special_attention,
    stacked,
    stacked_transposed,
    unlike,
)
from megatron.checkpoint.huggingface.name_map import Names
from megatron.checkpoint.huggingface.rope_config import rotary_settings, scaling_config, scaling_misfits
from megatron.checkpoint.huggingface.sliding_window import one_window
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.errors import ConfigIssue
from megatron.param_table import ModelDims

ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh", "reglu": "relu"}
"""Ours -> theirs: they name the activation of the gate."""
ACTIVATIONS_BACK = {theirs: ours for ours, theirs in ACTIVATIONS.items()}


def decoder_misfits(model: ModelSection, family: str = "LLaMA", **others: object) -> list[ConfigIssue]:
    """What of a model a family cannot say whose blocks are LLaMA's.

    Args:
        model: The model section.
        family: Its name, for messages.
        others: Values of keys in which it differs from LLaMA; further keys of which it has one value.
    """
    expected = {"norm": "rmsnorm", "pos_emb": "rotary", "rotary_pct": 1.0, "gpt_j_residual": False, **others}
    errors = unlike(model, expected, family) + special_attention(model, family) + scaling_misfits(model)
    if model.activation not in ACTIVATIONS:
        errors.append(ConfigIssue(f"a {family} model has a gated activation", key="activation", value=model.activation))
    return errors


def _llama_misfits(model: ModelSection) -> list[ConfigIssue]:
    return decoder_misfits(model) + unlike(model, {"sliding_window_width": None, "use_qk_layernorm": False}, "LLaMA")


def _mistral_misfits(model: ModelSection) -> list[ConfigIssue]:
    expected = {"use_bias_in_attn_linear": False, "use_bias_in_mlp": False, "use_qk_layernorm": False}
    return decoder_misfits(model) + unlike(model, expected, "Mistral")


def decoder_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    """Returns what config.json of every such family says."""
    return {
        "vocab_size": padded_vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": ModelDims.of(model).head_dim,
        "intermediate_size": model.mlp_width,
        "hidden_act": ACTIVATIONS[model.activation],
        "rope_theta": float(model.rotary_emb_base),
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_epsilon,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": not model.no_weight_tying,
        **scaling_config(model),
    }


def _llama_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    biases = {"attention_bias": model.use_bias_in_attn_linear, "mlp_bias": model.use_bias_in_mlp}
    return decoder_config(model, padded_vocab_size) | biases


def _mistral_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return decoder_config(model, padded_vocab_size) | {"sliding_window": model.sliding_window_width}


def decoder_settings(
    theirs: Mapping[str, Any],
    rotary: Settings | None = None,
    *,
    epsilon: tuple[str, str] = ("rms_norm_epsilon", "rms_norm_eps"),
) -> Settings:
    """Returns our keys of what every such family says.

    Args:
        theirs: config.json, completed.
        rotary: The keys of rotary positions; read from `theirs` unless given, and of whole heads then.
        epsilon: Our key of the norm's epsilon, and theirs.
    """
    if rotary is None:
        rotary = rotary_settings(theirs, base="rope_theta")
        check_config({"partial_rotary_factor": rotary["rotary_pct"]}, {"partial_rotary_factor": 1.0})
    heads = theirs["num_attention_heads"]
    return {
        "num_layers": theirs["num_hidden_layers"],
        "hidden_size": theirs["hidden_size"],
        "num_attention_heads": heads,
        "num_kv_heads": theirs["num_key_value_heads"] or heads,
        "kv_channels": theirs["head_dim"] or theirs["hidden_size"] // heads,
        "intermediate_size": 3 * theirs["intermediate_size"],
        "activation": choose(ACTIVATIONS_BACK, theirs, "hidden_act"),
        "max_position_embeddings": theirs["max_position_embeddings"],
        "norm": "rmsnorm",
        epsilon[0]: float(theirs[epsilon[1]]),
        "pos_emb": "rotary",
        **rotary,
        "use_bias_in_attn_linear": bool(theirs["attention_bias"]),
        "use_bias_in_mlp": bool(theirs["mlp_bias"]),
        "no_weight_tying": not theirs["tie_word_embeddings"],
    }


def _llama_settings(theirs: Mapping[str, Any]) -> Settings:
    one_window(theirs, None, ["full_attention"] * theirs["num_hidden_layers"])
    return decoder_settings(theirs)


def _mistral_settings(theirs: Mapping[str, Any]) -> Settings:
    """Their blocks have no biases, whatever config.json says."""
    window = theirs["sliding_window"]
    kind = "full_attention" if window is None else "sliding_attention"
    found = one_window(theirs, window, [kind] * theirs["num_hidden_layers"])
    return decoder_settings({**theirs, "attention_bias": False, "mlp_bias": False}) | found


def _experts(dims: ModelDims, ours: str, theirs: str) -> list[TensorMapping]:
    names = [f"{theirs}block_sparse_moe.experts.{expert}" for expert in range(dims.mixture.experts)]
    return [
        same(f"{ours}mlp.router.layer.weight", f"{theirs}block_sparse_moe.gate.weight"),
        stacked(f"{ours}mlp.experts.mlp.w1", tuple(f"{name}.w1.weight" for name in names)),
        stacked(f"{ours}mlp.experts.mlp.w3", tuple(f"{name}.w3.weight" for name in names)),
        stacked_transposed(f"{ours}mlp.experts.mlp.w2", tuple(f"{name}.w2.weight" for name in names)),
    ]


NAMES = Names(
    embedding="model.embed_tokens",
    block="model.layers.{}.",
    input_norm="input_layernorm",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    dense="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    linear1=("mlp.up_proj", "mlp.gate_proj"),
    linear2="mlp.down_proj",
    final_norm="model.norm",
    head="lm_head",
    norm_values=(("scale", "weight"),),
    experts=_experts,
)


LLAMA = ModelFamily(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    misfits=_llama_misfits,
    config=_llama_config,
    settings=_llama_settings,
    table=NAMES.table,
    spare=(".rotary_emb.inv_freq",),
    prefix="model.",
)
MISTRAL = ModelFamily(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    misfits=_mistral_misfits,
    config=_mistral_config,
    settings=_mistral_settings,
    table=NAMES.table,
    spare=(".rotary_emb.inv_freq",),
    prefix="model.",
)


def _mixtral_misfits(model: ModelSection, moe: MoeSection) -> list[ConfigIssue]:
    return expert_misfits(moe, "Mixtral", moe_normalize_top_k=True)


def _mixtral_experts(model: ModelSection, moe: MoeSection) -> Settings:
    return {
        "num_local_experts": moe.moe_num_experts,
        "num_experts_per_tok": moe.moe_top_k,
        "router_aux_loss_coef": moe.moe_aux_loss_coeff / moe.moe_top_k,  # theirs counts every choice of a token
        "router_jitter_noise": moe.moe_jitter_eps or 0.0,
    }


def _mixtral_settings(theirs: Mapping[str, Any]) -> Settings:
    return _mistral_settings(theirs) | {
        "moe_num_experts": theirs["num_local_experts"],
        "moe_top_k": theirs["num_experts_per_tok"],
        "moe_router_type": "topk",
        "moe_normalize_top_k": True,
        "moe_aux_loss_coeff": float(theirs["router_aux_loss_coef"] or 0.0) * theirs["num_experts_per_tok"],
        "moe_jitter_eps": theirs["router_jitter_noise"] or None,
    }


MIXTRAL = ModelFamily(
    name="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    misfits=_mistral_misfits,
    config=_mistral_config,
    settings=_mixtral_settings,
    table=NAMES.table,
    spare=(".rotary_emb.inv_freq",),
    prefix="model.",
    experts=ExpertsMapping(_mixtral_misfits, _mixtral_experts),
)
