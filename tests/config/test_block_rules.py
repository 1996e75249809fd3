"""What mixtures of experts and blocks without attention cannot do is refused, each rule in its own words."""

from typing import Any

import pytest

from tests.config.small import errors, resolved

TOPK = {"moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": "topk"}
MAMBA2: dict[str, Any] = {"attention_config": [[["mamba2"], "all"]]}
DELTA = {"attention_config": [[["gated_delta_net", "global"], "all"]]}
ALONE: dict[str, Any] = {"attention_config": [[["attention", "mlp"], "all"]]}
ONLY_ATTENTION: dict[str, Any] = {"attention_config": [[["attention", "mamba2"], "all"]], "mamba_num_groups": 1}
ONLY_MLPS: dict[str, Any] = {"attention_config": [[["mlp"], "all"]], "pos_emb": "none"}
CASES: list[tuple[int, dict[str, Any], str]] = [
    (
        2,
        {"moe_num_experts": 2, "moe_expert_parallel_size": 2, "zero_optimization": {"stage": 3}},
        "ZeRO 3 shards parameters over all data-parallel ranks, also those that hold other experts; use stage 0, 1",
    ),
    (1, {"moe_num_experts": 2, "moe_top_k": 3}, "moe_top_k = 3: there are 2 experts"),
    (2, {"moe_expert_parallel_size": 2}, "there are no experts to shard (moe_num_experts = 1); give moe_num_experts"),
    (
        2,
        {"moe_num_experts": 3, "moe_expert_parallel_size": 2},
        "moe_expert_parallel_size = 2: it does not divide moe_num_experts = 3",
    ),
    (
        2,
        {"moe_num_experts": 4, "moe_expert_parallel_size": 2, "model_parallel_size": 2},
        "experts are sharded over data-parallel ranks, of which there are 1; choose a divisor of 1",
    ),
    (
        2,
        {
            "moe_num_experts": 4,
            "moe_expert_parallel_size": 2,
            "zero_optimization": {"stage": 1, "reduce_scatter": False},
        },
        "DeepSpeed needs reduce_scatter where experts are sharded over ranks; leave reduce_scatter out",
    ),
    (
        2,
        {
            "moe_num_experts": 4,
            "moe_expert_parallel_size": 2,
            "zero_optimization": {"stage": 1, "contiguous_gradients": False},
        },
        "DeepSpeed needs contiguous_gradients where experts are sharded over ranks; leave contiguous_gradients out",
    ),
    (
        2,
        {
            "moe_num_experts": 4,
            "moe_expert_parallel_size": 2,
            "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        },
        "DeepSpeed's norm of offloaded gradients does not count experts that are sharded over ranks",
    ),
    (
        1,
        {"moe_num_experts": 4, "moe_normalize_top_k": True},
        "the weight of a single expert would always be 1, and the router would learn nothing",
    ),
    (1, {"moe_num_experts": 4, "moe_expert_interval": 0}, "moe_expert_interval = 0: it must be at least 1"),
    (1, {"moe_capacity_factor": 0.0}, "moe_capacity_factor = 0.0: it must be more than 0"),
    (1, {"moe_z_loss_coeff": -1.0}, "moe_z_loss_coeff = -1.0: it cannot be negative"),
    (1, {"moe_router_bias_update_rate": 0.0}, "moe_router_bias_update_rate = 0.0: it must be more than 0"),
    (1, {**TOPK, "moe_layer_freq": [1]}, "moe_layer_freq = [1]: it takes a 1 or a 0 for each of the 2 blocks"),
    (1, {**TOPK, "moe_layer_freq": [0, 0]}, "no block with an MLP has experts; set moe_num_experts: 1"),
    (1, {**TOPK, "moe_first_k_dense_replace": 2}, "moe_first_k_dense_replace = 2: no block with an MLP has experts"),
    (
        1,
        {**TOPK, "moe_layer_freq": [0, 1], "moe_first_k_dense_replace": 1},
        "moe_first_k_dense_replace = 1: moe_layer_freq names the blocks with experts; leave one of the two out",
    ),
    (1, {**TOPK, "moe_ffn_hidden_size": 0}, "moe_ffn_hidden_size = 0: it must be at least 1"),
    (
        2,
        {**TOPK, "moe_shared_expert_intermediate_size": 33, "model_parallel_size": 2},
        "moe_shared_expert_intermediate_size = 33: model_parallel_size = 2 does not divide it",
    ),
    (1, {**TOPK, "moe_shared_expert_gate": True}, "there are no shared experts to multiply"),
    (1, {**TOPK, "moe_router_num_groups": 2}, "groups need their number and how many a token uses"),
    (
        1,
        {**TOPK, "moe_router_num_groups": 3, "moe_router_group_topk": 1},
        "moe_router_num_groups = 3: it does not divide moe_num_experts = 4",
    ),
    (
        1,
        {**TOPK, "moe_router_num_groups": 4, "moe_router_group_topk": 1, "moe_router_group_experts": 1},
        "1 groups of 1 hold fewer than the 2 experts of a token",
    ),
    (
        1,
        {**TOPK, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
        "moe_router_group_experts = 2: it must be between 1 and the 1 experts of a group",
    ),
    (
        1,
        {**TOPK, "moe_router_type": "sinkhorn", "moe_router_score_function": "sigmoid"},
        "moe_router_score_function = 'sigmoid': the router sinkhorn has its own scores and assignment",
    ),
    (
        1,
        {**TOPK, "moe_router_pre_softmax": False, "moe_router_enable_expert_bias": True},
        "the bias is added to scores, and the choice is by logits, whose size nothing limits",
    ),
    (
        1,
        {**TOPK, "moe_router_pre_softmax": False, "moe_router_score_function": "sigmoid"},
        "sigmoid scores have no softmax",
    ),
    (
        2,
        {"attention_config": [[["mamba", "gmlp"], "all"]], "context_parallel_size": 2},
        "blocks of kind gmlp mix all positions by one matrix, so ranks cannot share a sequence; use",
    ),
    (
        2,
        {"attention_config": [[["mamba"], "all"]], "context_parallel_size": 2, "seq_length": 4},
        "the convolution of a Mamba block reads 3 positions before its own, more than a rank has of 4 tokens; "
        "use sequences of at least 6 tokens",
    ),
    (
        2,
        {
            "attention_config": [[["mamba"], "all"]],
            "context_parallel_size": 2,
            "curriculum_learning": {
                "enabled": True,
                "curriculum_type": "seqlen",
                "schedule_type": "fixed_discrete",
                "schedule_config": {"difficulty": [4, 32], "max_step": [5]},
            },
        },
        "more than a rank has of 4 tokens",
    ),
    (
        1,
        {"attention_config": [[["mamba"], "all"]], "attention_dropout": 0.1},
        "attention_dropout = 0.1: no block has attention; set it to 0",
    ),
    (
        1,
        {"attention_config": [[["mamba"], "all"]], "pos_emb": "alibi"},
        "pos_emb = 'alibi': this changes attention, and no block has any; use none, learned or sinusoidal",
    ),
    (
        1,
        {"attention_config": [[["rwkv", "global"], "all"]], "pos_emb": "rpe"},
        "the first block holds the table of all blocks, and it is of kind rwkv; let the first block have attention",
    ),
    (1, MAMBA2, "mamba_num_groups = 8: it does not divide the 2 heads of a mamba2 block"),
    (
        1,
        {**MAMBA2, "mamba_head_dim": 48},
        "mamba_head_dim = 48: it does not divide 2 x hidden_size = 128; change it, or",
    ),
    (1, {"mamba_head_dim": 0}, "mamba_head_dim = 0: it must be at least 1"),
    (1, {"mamba_dt_limit": [0.1]}, "these are not a smallest and a largest step"),
    (
        2,
        {**MAMBA2, "mamba_num_groups": 1, "model_parallel_size": 2},
        "mamba_num_groups = 1: model_parallel_size = 2 does not divide it; the heads of a group share B, C and a norm",
    ),
    *(
        (1, {**MAMBA2, "mamba_num_groups": 1, "mamba_dt_limit": limits}, "these are not a smallest and a largest step")
        for limits in ([0.1], [0.1, 0.01], [-1, None], ["a", None])
    ),
    (
        2,
        {**MAMBA2, "mamba_num_groups": 1, "context_parallel_size": 2, "seq_length": 4},
        "the convolution of a Mamba block reads 3 positions before its own, more than a rank has of 4 tokens",
    ),
    *(
        (1, {**ALONE, **changes}, f"a block of kind attention and mlp has one sublayer: {why}")
        for changes, why in (
            ({"gpt_j_residual": True}, "nothing in it could be parallel"),
            ({"norm_placement": "output"}, "it has one norm, before attention or MLP"),
            ({"use_mup": True}, "the depth of the model is counted in pairs"),
            ({"compile": True}, "blocks are compiled with attention and MLP"),
        )
    ),
    (
        1,
        {**ALONE, "te_layernorm_mlp": True},
        "a block of kind attention and mlp has one sublayer: Transformer Engine's layers are put into blocks with both",
    ),
    (1, {**ALONE, **TOPK, "moe_layer_freq": [1, 0]}, "no block with an MLP has experts"),
    (
        1,
        {**ONLY_ATTENTION, "lora": {"rank": 4, "targets": ["dense_h_to_4h"]}},
        "no block has an MLP, so no block has a dense_h",
    ),
    (1, {**ONLY_MLPS, "lora": {"rank": 4}}, "no block has attention, so no block has a query_key_value"),
    (1, {"attention_config": [[["rwkv"], "all"]], "head_size": 7}, "head_size = 7: 4 heads of 64 features are 16 wide"),
    (1, {"attention_config": [[["rwkv"], "all"]], "dim_att": 66}, "num_attention_heads = 4 does not divide it"),
    (
        1,
        {"attention_config": [[["gmlp"], "all"]], "activation": "swiglu"},
        "a gMLP gates by itself, and needs an activation that keeps the width; use gelu or the like",
    ),
    (1, {"attention_config": [[["amlp"], "all"]], "gmlp_attn_dim": 0}, "gmlp_attn_dim = 0: it must be at least 1"),
    (
        2,
        {"attention_config": [[["gated_delta_net", "global"], "all"]], "context_parallel_size": 2, "seq_length": 4},
        "the convolution of a gated delta net reads 3 positions before its own, more than a rank has of 4 tokens",
    ),
    (
        1,
        {**DELTA, "linear_num_value_heads": 24},
        "linear_num_value_heads = 24: linear_num_key_heads = 16 does not divi",
    ),
    (1, {**DELTA, "linear_key_head_dim": 0}, "linear_key_head_dim = 0: it must be at least 1"),
    (
        2,
        {**DELTA, "linear_num_key_heads": 1, "model_parallel_size": 2},
        "linear_num_key_heads = 1: model_parallel_size = 2 does not divide it, and ranks have whole key heads",
    ),
    (1, {**DELTA, "compile": True}, "there are blocks of kind gated_delta_net: the chunks of its state are no part of"),
    (1, {**DELTA, "te_mha": True}, "Transformer Engine's attention has no such state; leave te_mha out"),
    (1, {**DELTA, "use_mup": True, "mup_base_widths": None}, "muP has no rules for blocks of kind gated_delta_net"),
    (1, {"expansion_factor": 1.0e300}, "expansion_factor = 1e+300: at most 10,000"),
    (1, {"moe_num_experts": 5000}, "moe_num_experts = 5000: at most 4,096"),
    (1, {"moe_jitter_eps": 1.5}, "moe_jitter_eps = 1.5: it must be between 0 and 1"),
]


@pytest.mark.parametrize(("world_size", "changes", "reported"), CASES, ids=[case[2][:50] for case in CASES])
def test_rule(world_size: int, changes: dict[str, Any], reported: str) -> None:
    lines = errors(world_size, **changes)
    assert any(reported in line for line in lines), "\n".join(lines)


def test_spread_experts_get_the_zero_block_that_they_need() -> None:
    changes = {"moe_num_experts": 4, "moe_expert_parallel_size": 2, "precision": "bfloat16"}
    block = resolved(2, **changes).config.deepspeed.zero_optimization or {}
    assert (block["stage"], block["contiguous_gradients"]) == (1, True)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {"moe_num_experts": 4, "moe_expert_parallel_size": 2, "zero_optimization": {"stage": 2}}),
        (2, {"attention_config": [[["mamba"], "all"]], "model_parallel_size": 2, "num_attention_heads": 1}),
        (2, {"attention_config": [[["rwkv", "global"], "all"]], "model_parallel_size": 2, "sequence_parallel": True}),
        (1, {"attention_config": [[["gmlp", "amlp"], "all"]], "reset_attention_mask": True}),
        (2, {**ALONE, "model_parallel_size": 2, "lora": {"rank": 4}, "pos_emb": "rotary"}),
        (2, {**MAMBA2, "mamba_num_groups": 2, "model_parallel_size": 2, "sequence_parallel": True}),
        (2, {**MAMBA2, "mamba_num_groups": 1, "context_parallel_size": 2, "num_kv_heads": None}),
        (2, {"attention_config": [[["rwkv", "mamba"], "all"]], "zero_optimization": {"stage": 3}}),
        (2, {"moe_num_experts": 2, "zero_optimization": {"stage": 3}}),
    ],
)
def test_what_no_rule_forbids(world_size: int, changes: dict[str, Any]) -> None:
    assert resolved(world_size, **changes).not_supported_yet == []
