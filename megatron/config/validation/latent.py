"""Rules for multi-head latent attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.adapter_config import low_rank
from megatron.config.config import Config
from megatron.errors import ConfigIssue
from megatron.registry import ATTENTION, BIDIRECTIONAL, FULL_ATTENTION, WITHOUT_ATTENTION

WIDTHS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
KEY = "multi_latent_attention"


def latents_have_widths(config: Config) -> Iterator[ConfigIssue]:
    """Widths are positive, rotated features are pairs, and the width of a head is the sum of its parts."""
    model = config.model
    if not model.multi_latent_attention:
        return
    for name in WIDTHS:
        width = getattr(model, name)
        if width is not None and width < 1:
            hint = "leave it out for queries without a latent" if name == "q_lora_rank" else None
            yield ConfigIssue("it must be at least 1", key=name, value=width, hint=hint)
    if model.qk_pos_emb_head_dim % 2:
        what = "rotary positions rotate pairs of features"
        yield ConfigIssue(what, key="qk_pos_emb_head_dim", value=model.qk_pos_emb_head_dim, hint="give an even number")
    head = model.qk_head_dim + model.qk_pos_emb_head_dim
    if model.kv_channels not in (None, head):
        what = f"with {KEY} a head has qk_head_dim + qk_pos_emb_head_dim = {head} features"
        yield ConfigIssue(what, key="kv_channels", value=model.kv_channels, hint="leave it out")
    if model.num_kv_heads != model.num_attention_heads:
        what = f"with {KEY} the latent has keys and values of all {model.num_attention_heads} heads"
        yield ConfigIssue(what, key="num_kv_heads", value=model.num_kv_heads, hint="leave it out")


def latents_fit_other_parts(config: Config) -> Iterator[ConfigIssue]:
    """What is made for one joint projection of queries, keys and values has no place in latent attention."""
    model, engine = config.model, config.transformer_engine
    if not model.multi_latent_attention:
        return
    reasons: dict[str, tuple[bool, str]] = {
        "pos_emb": (model.pos_emb != "rotary", "its positions are rotary ones, in features of their own"),
        "rotary_pct": (model.rotary_pct != 1.0, "qk_pos_emb_head_dim says how many features are rotated"),
        "use_qk_layernorm": (model.use_qk_layernorm, "its norms are on the latents"),
        "attention_output_gate": (model.attention_output_gate, "its heads have values of another width than queries"),
        "attention_mask": (model.attention_mask == BIDIRECTIONAL, "it is built for causal models"),
        "use_mup": (config.mup.use_mup, "muP has no rule for its ranks, which do not grow with the width"),
        "te_mha": (engine.te_mha, "Transformer Engine's attention has one joint projection"),
        "te_fp8_mha": (engine.te_fp8_mha, "the projections of latents are no layers of Transformer Engine"),
        "fp8": (config.precision.fp8 is not None, "the sizes of FP8 products are not checked for latents"),
    }
    for key, (applies, why) in reasons.items():
        if applies:
            value = config.flat()[key]
            yield ConfigIssue(f"{KEY} is on: {why}", key=key, value=value, hint=f"change it, or leave {KEY} out")
    yield from _kinds_attend_to_all(config)
    yield from _adapters_have_matrices(config)
    yield from _one_scale_of_scores(config)
    if config.optimizer.params.get("qk_clip_threshold") is not None:
        what = f"qk_clip_threshold scales the joint projection of queries and keys, and with {KEY} there is none"
        yield ConfigIssue(what, key="optimizer", value=config.optimizer.optimizer, hint="leave qk_clip_threshold out")


def _kinds_attend_to_all(config: Config) -> Iterator[ConfigIssue]:
    kinds = set(map(str, config.model.attention_config or ())) - WITHOUT_ATTENTION
    others = sorted(kind for kind in kinds if not ATTENTION.entry(kind).traits >= FULL_ATTENTION)
    if others:
        what = f"with {KEY} blocks of kind {', '.join(others)} have no layout: every head sees the same latents"
        hint = "use global or flash, with a sliding_window_width if needed"
        yield ConfigIssue(what, key="attention_config", value=others, hint=hint)


def _adapters_have_matrices(config: Config) -> Iterator[ConfigIssue]:
    adapter = low_rank(config.model.lora)
    if adapter is not None and "query_key_value" in adapter.targets:
        what = f"with {KEY} there is no query_key_value, and the projections of latents take no low-rank updates"
        yield ConfigIssue(what, key="lora", value=config.model.lora, hint="write targets: [dense]")


def _one_scale_of_scores(config: Config) -> Iterator[ConfigIssue]:
    """The scores of all blocks have one factor, which mscale_all_dim changes."""
    model = config.model
    types: dict[str, Any] = dict(model.layer_type_options or {}) if model.layer_types else {}
    factors = [_score_exponent(model.rope_scaling)]
    factors += [
        _score_exponent(options["rope_scaling"]) for options in types.values() if options and "rope_scaling" in options
    ]
    if any(factor != factors[0] for factor in factors):
        what = f"with {KEY} mscale_all_dim changes the scores of all blocks, and these types differ in it"
        yield ConfigIssue(what, key="layer_type_options", value=types, hint="give all of them the same rope_scaling")


def _score_exponent(scaling: Any) -> tuple[Any, Any]:
    """Returns what the factor of scores follows from."""
    known = scaling if isinstance(scaling, dict) or hasattr(scaling, "get") else {}
    return (known.get("factor"), known["mscale_all_dim"]) if known.get("mscale_all_dim") else (None, None)
