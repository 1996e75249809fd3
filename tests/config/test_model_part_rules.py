"""Norms around attention and MLP, factors, bounds and types of blocks that cannot be are refused with the reason."""

from typing import Any

import pytest

from tests.config.small import errors, resolved

ROTARY = {"pos_emb": "rotary"}
ACROSS = {"use_qk_layernorm": True, "qk_layernorm_across_heads": True}
RINGS = {"context_parallel_size": 2, "context_parallel_method": "ring"}
MUP = {"use_mup": True, "mup_base_widths": None}


def typed(**options: Any) -> dict[str, Any]:
    return {**ROTARY, "layer_types": ["a", "a"], "layer_type_options": {"a": options}}


SHARED_VALUES = {"value_residual": True}
SINKS = {"softmax_type": "learnable"}
CASES: list[tuple[int, dict[str, Any], str]] = [
    (1, {"norm_placement": "sandwich", "gpt_j_residual": True}, "attention and MLP are added together, before a norm"),
    (1, {"norm_placement": "output", "attention_config": ["mamba", "global"]}, "blocks of kind mamba have norms of"),
    (1, {"activation": "xielu", "moe_num_experts": 2}, "experts share one activation"),
    (1, {"activation": "xielu", "attention_config": ["gmlp", "global"]}, "blocks of kind gmlp have no such parameters"),
    (1, {"activation": "xielu", "use_mup": True, "base_shapes_file": "x"}, "muP has no rule for its factors"),
    (1, {"lora": {"rank": 4, "dora": True}, "te_rowparallel": True}, "dora scales the product of a frozen matrix"),
    (1, {"norm_placement": "output", "te_layernorm_mlp": True}, "layer has a norm before its MLP only"),
    (1, ACROSS, "a norm over all heads is a root mean square norm, and norm = layernorm; use norm: rmsnorm"),
    (
        2,
        {**ACROSS, "norm": "rmsnorm", "num_kv_heads": 1, "model_parallel_size": 2},
        "the 1 key heads do not divide by model_parallel_size = 2",
    ),
    (1, {"softmax_scale": 0.0}, "softmax_scale = 0.0: it must be a number above 0"),
    (1, {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping = -1.0: it must be a number above 0"),
    (1, {"final_logit_softcapping": 0.0}, "final_logit_softcapping = 0.0: it must be a number above 0"),
    (1, {"logit_scale": 0.0}, "logit_scale = 0.0: it must be a number above 0"),
    (1, {"embedding_multiplier": 0.0}, "embedding_multiplier = 0.0: it must be a number other than 0"),
    (1, {"residual_multiplier": 0.0}, "residual_multiplier = 0.0: it must be a number other than 0"),
    (1, {"attn_logit_softcapping": 5.0, "te_mha": True}, "attention (te_mha) has no bound of scores; leave te_mha out"),
    (2, {**RINGS, "attn_logit_softcapping": 5.0}, "(context_parallel_method: ring) has no such bound of scores"),
    (
        1,
        {"activation_func_clamp_value": 0.0, "activation": "swiglu"},
        "activation_func_clamp_value = 0.0: it must be a",
    ),
    (1, {**SINKS, "te_mha": True}, "softmax_type is learnable: Transformer Engine's attention sums the keys alone"),
    (1, {**SINKS, "compile": True}, "compile = True: softmax_type is learnable: its core is no part of a compiled gr"),
    (
        1,
        {**SINKS, "train_impl": "bert"},
        "attention_mask = 'bidirectional': softmax_type is learnable: it is built",
    ),
    (
        1,
        {**SINKS, "scaled_masked_softmax_fusion": True},
        "scaled_masked_softmax_fusion = True: softmax_type is learnable: Triton's softmax sums the keys alone",
    ),
    (
        1,
        {**SINKS, "multi_latent_attention": True, "pos_emb": "rotary"},
        "multi_latent_attention = True: softmax_type is learnable: latent attention sums the keys alone",
    ),
    (
        1,
        {"attention_output_gate": True, "multi_latent_attention": True, "pos_emb": "rotary"},
        "attention_output_gate = True: multi_latent_attention is on: its heads have values of another width",
    ),
    (1, {**SHARED_VALUES, "num_layers": 1}, "num_layers = 1: value_residual is on: there is no block after the first"),
    (
        1,
        {**SHARED_VALUES, "attention_config": ["mamba", "attention"]},
        "attention_config = ('mamba', 'attention'): value_residual is on: attention and mamba has no values",
    ),
    (
        1,
        {**SHARED_VALUES, "multi_latent_attention": True, "pos_emb": "rotary"},
        "multi_latent_attention = True: value_residual is on: its values are projections of latents",
    ),
    (1, {**SHARED_VALUES, "train_impl": "bert"}, "attention_mask = 'bidirectional': value_residual is on: it is built"),
    (
        1,
        {**SHARED_VALUES, "mtp_num_layers": 1, "pos_emb": "rotary", "pipe_parallel_size": 0},
        "mtp_num_layers = 1: value_residual is on: its modules would have no values of the first block",
    ),
    (1, {"lora": {"rank": 4, "targets": ["output_gate"]}}, "the model has no output_gate (attention_output_gate); lea"),
    (1, {"layer_types": ["sliding"]}, "layer_types = ['sliding']: this makes 1 block, but num_layers = 2"),
    (
        1,
        {"layer_types": ["slding", "full"], "layer_type_options": {"sliding": {}, "full": {}}},
        "does not say what blocks of type slding have; did you mean sliding?",
    ),
    (1, typed(window=3), "a: a type has no window, but sliding_window_width, rotary_emb_base, rope_scaling, rotary"),
    (1, typed(sliding_window_width=0), "a: sliding_window_width is a number of tokens from 1 on, or null, not 0"),
    (1, typed(rotary_emb_base=0.5), "a: rotary_emb_base is a whole number above 0, not 0.5"),
    (1, typed(rotary="no"), "a: rotary is true or false, not 'no'"),
    (1, typed(rope_scaling={"type": "yarn", "factor": 2.0}), "a: rope_scaling: yarn needs original_max_position_embed"),
    (1, typed(rope_scaling=2), "a: rope_scaling: it is a table or null, not 2"),
    (1, {**typed(), "layer_type_options": {"a": 3}}, "a: write the options of a type as a table, not 3"),
    (
        1,
        {**typed(rotary=False), "pos_emb": "alibi"},
        "a: pos_emb = alibi has no rotary positions that rotary could change",
    ),
]


@pytest.mark.parametrize(("world", "changes", "reported"), CASES)
def test_what_cannot_be_is_refused_with_the_reason(world: int, changes: dict[str, Any], reported: str) -> None:
    found = errors(world, **changes)
    assert any(reported in line for line in found), found


@pytest.mark.parametrize(
    "changes", [{"softmax_scale": 0.2}, {"scale_embeddings": True}, {"logit_scale": 2.0}, {"norm": "rmsnorm_1p"}]
)
def test_mup_has_factors_of_its_own(changes: dict[str, Any]) -> None:
    assert any("muP has a factor of its own in this place" in line for line in errors(use_mup=True, **changes))


def test_a_pattern_becomes_a_type_for_each_block() -> None:
    options = {"sliding": {"sliding_window_width": 4, "rotary_emb_base": 100}, "full": None}
    keys = {**ROTARY, "num_layers": 5, "layer_type_options": options}
    config = resolved(**keys, layer_types=[[["sliding", "sliding", "full"], 1], [["sliding"], 2]]).config
    assert config.model.layer_types == ("sliding", "sliding", "full", "sliding", "sliding")
    widths = [block.sliding_window_width for block in config.model.block_options]
    assert widths == [4, 4, None, 4, 4]
    assert [block.rotary_emb_base for block in config.model.block_options] == [100, 100, 10000, 100, 100]
