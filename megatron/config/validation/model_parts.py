"""Rules for norms around attention and MLP, factors, bounds, and types of blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.config.config import Config
from megatron.config.validation.positions import scaling_error
from megatron.errors import ConfigIssue
from megatron.layer_types import OPTIONS, ROTARY
from megatron.registry import (
    ACTIVATIONS,
    BIDIRECTIONAL,
    MIXER_BLOCKS,
    NORMS,
    ONE_PLUS,
    POSITIONS,
    VANILLA,
    nearest_name,
)
from megatron.registry.attention import SOFTMAX_KEYS

POSITIVE = (
    *("softmax_scale", "attn_logit_softcapping", "final_logit_softcapping", "logit_scale"),
    "activation_func_clamp_value",
)
NOT_ZERO = ("embedding_multiplier", "residual_multiplier")
WITH_MUP = {"softmax_scale": None, "scale_embeddings": False, "embedding_multiplier": 1.0, "logit_scale": 1.0}
"""Factors where muP has its own -> the value without one."""


def norms_fit_their_blocks(config: Config) -> Iterator[ConfigIssue]:
    """Norms on what attention and MLP give are for blocks that add these one after the other."""
    model = config.model
    if model.norm_placement == "pre":
        return
    others = sorted(set(map(str, model.attention_config or ())) & MIXER_BLOCKS)
    reasons = {
        "gpt_j_residual": (model.gpt_j_residual, "attention and MLP are added together, before a norm could see each"),
        "attention_config": (bool(others), f"blocks of kind {', '.join(others)} have norms of their own"),
        "te_layernorm_mlp": (
            config.transformer_engine.te_layernorm_mlp,
            "Transformer Engine's layer has a norm before its MLP only",
        ),
    }
    for key, (applies, why) in reasons.items():
        if applies:
            what = f"with {key} a block has no norms in the places that this names: {why}"
            hint = f"use norm_placement: pre, or leave {key} out"
            yield ConfigIssue(what, key="norm_placement", value=model.norm_placement, hint=hint)


def norms_across_heads_see_all(config: Config) -> Iterator[ConfigIssue]:
    """One norm of all heads sums squares over ranks, each of which has key heads of its own."""
    model, ranks = config.model, config.parallelism.model_parallel_size
    if not (model.use_qk_layernorm and model.qk_layernorm_across_heads):
        return
    assert model.num_kv_heads
    if NORMS.entry(model.norm).kernel != "rms_norm":
        yield ConfigIssue(
            f"a norm over all heads is a root mean square norm, and norm = {model.norm}",
            key="qk_layernorm_across_heads",
            value=True,
            hint="use norm: rmsnorm, or leave it out",
        )
    if ranks > 0 and model.num_kv_heads % ranks:
        yield ConfigIssue(
            f"the {model.num_kv_heads} key heads do not divide by model_parallel_size = {ranks}, and ranks that share "
            "a head would count its squares more than once",
            key="qk_layernorm_across_heads",
            value=True,
            hint="use fewer tensor parallel ranks",
        )


def factors_are_numbers(config: Config) -> Iterator[ConfigIssue]:
    """Bounds and factors of logits are positive, other factors are not 0; muP has factors of its own."""
    model = config.model
    for key in POSITIVE:
        value = getattr(model, key)
        if value is not None and not 0 < value < float("inf"):
            yield ConfigIssue("it must be a number above 0", key=key, value=value)
    for key in NOT_ZERO:
        if not 0 < abs(getattr(model, key)) < float("inf"):
            yield ConfigIssue("it must be a number other than 0", key=key, value=getattr(model, key))
    if not config.mup.use_mup:
        return
    own = {key: getattr(model, key) for key, none in WITH_MUP.items() if getattr(model, key) != none}
    if NORMS.entry(model.norm).traits >= ONE_PLUS:
        own["norm"] = model.norm
    for key, value in own.items():
        what = "muP has a factor of its own in this place (use_mup)"
        yield ConfigIssue(what, key=key, value=value, hint="leave it out, or use_mup")


def bounds_are_computed(config: Config) -> Iterator[ConfigIssue]:
    """Transformer Engine's attention has no bound of scores."""
    bound = config.model.attn_logit_softcapping
    if bound is not None and config.transformer_engine.te_mha:
        what = "Transformer Engine's attention (te_mha) has no bound of scores"
        yield ConfigIssue(what, key="attn_logit_softcapping", value=bound, hint="leave te_mha out")


def sinks_are_computed(config: Config) -> Iterator[ConfigIssue]:
    """Attention whose softmax sums more than the keys has a core of its own."""
    model, kernels = config.model, config.kernels
    if model.softmax_type == VANILLA:
        return
    reasons: dict[str, tuple[bool, str]] = {
        "multi_latent_attention": (model.multi_latent_attention, "latent attention sums the keys alone"),
        "attention_mask": (model.attention_mask == BIDIRECTIONAL, "it is built for causal models"),
        "te_mha": (config.transformer_engine.te_mha, "Transformer Engine's attention sums the keys alone"),
        "compile": (kernels.compile, "its core is no part of a compiled graph"),
        **{key: (getattr(kernels, key), "Triton's softmax sums the keys alone") for key in SOFTMAX_KEYS},
    }
    for key, (applies, why) in reasons.items():
        if applies:
            what = f"softmax_type is {model.softmax_type}: {why}"
            yield ConfigIssue(what, key=key, value=config.flat()[key], hint=f"leave it out, or softmax_type: {VANILLA}")


def layer_types_are_known(config: Config) -> Iterator[ConfigIssue]:
    """Every block's type has options, and these are what a type may have."""
    model = config.model
    if model.layer_types is None:
        return
    types: Mapping[str, Any] = model.layer_type_options or {}
    for name, options in types.items():
        message = _options_error(config, options)
        if message is not None:
            yield ConfigIssue(f"{name}: {message}", key="layer_type_options", value=dict(types))
            return
    for name in dict.fromkeys(model.layer_types):
        if name not in types:
            close = nearest_name(str(name), types)
            yield ConfigIssue(
                f"layer_type_options does not say what blocks of type {name} have",
                key="layer_types",
                value=list(model.layer_types),
                hint=f"did you mean {close}?" if close else f"add {name}: {{}} for the model's own values",
            )


def _options_error(config: Config, options: Any) -> str | None:
    if options is not None and not isinstance(options, Mapping):
        return f"write the options of a type as a table, not {options!r}"
    positions = POSITIONS.entry(config.model.pos_emb)
    for option, value in (options or {}).items():
        if option not in OPTIONS:
            close = nearest_name(str(option), OPTIONS)
            return f"a type has no {option}" + (f"; did you mean {close}?" if close else f", but {', '.join(OPTIONS)}")
        if option != "sliding_window_width" and "rope_scaling" not in positions.settings:
            return f"pos_emb = {positions.name} has no rotary positions that {option} could change"
        message = _value_error(option, value)
        if message is not None:
            return message
    return None


def _value_error(option: str, value: Any) -> str | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if option == ROTARY:
        return None if isinstance(value, bool) else f"{option} is true or false, not {value!r}"
    if option == "rotary_emb_base":
        return None if is_count else f"{option} is a whole number above 0, not {value!r}"
    if option == "sliding_window_width":
        return (
            None if is_count or value is None else f"{option} is a number of tokens from 1 on, or null, not {value!r}"
        )
    if value is None:
        return None
    message = scaling_error(value) if isinstance(value, Mapping) else f"it is a table or null, not {value!r}"
    return None if message is None else f"{option}: {message}"


def learned_activations_have_an_mlp(config: Config) -> Iterator[ConfigIssue]:
    """An activation that learns is a part of an MLP of its own in each block."""
    model = config.model
    if not ACTIVATIONS.entry(model.activation).parameters:
        return
    kinds = sorted(set(map(str, model.attention_config or ())) & {"gmlp", "amlp"})
    reasons = {
        "moe_num_experts": (config.moe.moe_num_experts > 1, "experts share one activation"),
        "attention_config": (bool(kinds), f"blocks of kind {', '.join(kinds)} have no such parameters"),
        "use_mup": (config.mup.use_mup, "muP has no rule for its factors"),
    }
    for key, (applies, why) in reasons.items():
        if applies:
            what, hint = f"with {key} no activation learns: {why}", f"use another activation, or leave {key} out"
            yield ConfigIssue(what, key="activation", value=model.activation, hint=hint)
