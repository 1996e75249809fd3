"""Every pair of model options, in a few configurations that hold all pairs, trains on one repeated batch.

Each of them learns in 5 steps, and without dropout tensor parallelism or a pipeline does the same to 1e-5.
"""

from __future__ import annotations

import itertools
import math

import pytest

from tests.end_to_end.engines import BASE, PIPELINE, TENSOR, Curves, agree, train
from tests.multi_rank import run_distributed
from tests.options import (
    ACTIVATION_CASES,
    ATTENTION_CASES,
    LATENT_CASES,
    LATENTS,
    NORM_CASES,
    POSITION_CASES,
    Keys,
)

pytestmark = pytest.mark.long
GROUP = 30
"""Configurations that one call of ranks trains."""


def only(cases: dict[str, Keys], *names: str) -> list[Keys]:
    """Those of the named keys that each case has, without repetitions."""
    found: list[Keys] = []
    for case in cases.values():
        retained = {name: case[name] for name in names if name in case}
        if retained not in found:
            found.append(retained)
    return found


INITS = [
    "normal",
    "scaled_normal",
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
    "wang_init",
    "small_init",
    "single_residual_scaled_normal",
]
EXPERTS: Keys = {
    "moe_num_experts": 4,
    "moe_router_type": "topk",
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 16,
}
Factors = dict[str, list[Keys]]
FACTORS: Factors = {
    "positions": [
        {name: value for name, value in case.items() if name != "num_kv_heads"} for case in POSITION_CASES.values()
    ],
    "norm": only(NORM_CASES, "norm", "use_bias_in_norms", "use_qk_layernorm"),
    "activation": only(ACTIVATION_CASES, "activation", "intermediate_size", "mlp_multiple_of"),
    "attention": only(ATTENTION_CASES, "attention_config", "sparsity_config", "sliding_window_width"),
    "residual": [
        {},
        {"gpt_j_residual": True},
        {"gpt_j_residual": True, "gpt_j_tied": True},
        {"norm_placement": "output"},
        {"norm_placement": "sandwich"},
    ],
    "gate": [{}, {"attention_output_gate": True}],
    "values": [{}, {"value_residual": True}],
    "bounds": [
        {},
        {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0},
        {"softmax_type": "learnable"},
        {"softmax_type": "off-by-one"},
    ],
    "factors": [
        {},
        {"scale_embeddings": True, "residual_multiplier": 0.5, "logit_scale": 0.5, "softmax_scale": 0.2},
    ],
    "types": [
        {},
        {"layer_types": ["near", "far"], "layer_type_options": {"near": {"sliding_window_width": 5}, "far": {}}},
    ],
    "heads": [{}, {"num_kv_heads": 2}, {"num_kv_heads": 2, "kv_channels": 24}],
    "init": [{"init_method": name} for name in INITS],
    "output": [{"output_layer_init_method": name} for name in INITS],
    "tying": [{}, {"no_weight_tying": True}],
    "biases": [
        {},
        {"use_bias_in_attn_linear": False},
        {"use_bias_in_mlp": False},
        {"use_bias_in_attn_linear": False, "add_qkv_bias": True},
    ],
    "experts": [
        {},
        {**EXPERTS, "moe_use_bias_in_experts": True, "moe_shared_expert_gate": True, "moe_top_k": 1},
        {
            **EXPERTS,
            "moe_top_k": 2,
            "moe_first_k_dense_replace": 1,
            "moe_normalize_top_k": True,
            "moe_router_score_function": "sigmoid",
            "moe_router_num_groups": 2,
            "moe_router_group_topk": 1,
            "moe_router_topk_scaling_factor": 1.5,
            "moe_router_enable_expert_bias": True,
        },
        {**EXPERTS, "moe_top_k": 2, "moe_layer_freq": [1, 0], "moe_router_pre_softmax": False},
    ],
    "dropout": [{}, {"hidden_dropout": 0.1}, {"attention_dropout": 0.1}],
    "recompute": [{}, {"checkpoint_activations": True}, {"recompute_granularity": "selective"}],
    "layout": [TENSOR, PIPELINE],
}
_LATENT_KINDS: list[Keys] = [
    LATENTS,
    {**LATENTS, "q_lora_rank": 24, "rope_scaling": LATENT_CASES["latents"]["rope_scaling"]},
    {**LATENTS, "v_head_dim": 24, "use_bias_in_attn_linear": True},
]
_AROUND: Factors = {
    "norm": [{}, {"norm": "rmsnorm"}, {"norm": "layernorm_1p"}, {"norm": "scalenorm"}],
    **{name: FACTORS[name] for name in ("residual", "factors", "types", "tying", "experts", "dropout", "recompute")},
    "window": [{}, {"sliding_window_width": 7}],
    "bounds": FACTORS["bounds"],
}
LATENT_FACTORS: Factors = {
    "latents": _LATENT_KINDS,
    **_AROUND,
    "bounds": [bounds for bounds in FACTORS["bounds"] if "softmax_type" not in bounds],
    "layout": [TENSOR, PIPELINE],
}
_DELTA: Keys = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rms_norm_epsilon": 1e-3,  # with less the norm of heads magnifies rounding
}
DELTA_FACTORS: Factors = {
    "kinds": [
        {**_DELTA, "attention_config": ["global", "gated_delta_net"]},
        {**_DELTA, "attention_config": ["gated_delta_net", "global"], "linear_conv_kernel_dim": 2},
    ],
    **{name: values for name, values in _AROUND.items() if name != "types"},
    "positions": [{}, {"pos_emb": "rotary"}, {"pos_emb": "none"}],
    "gate": FACTORS["gate"],
    "layout": [TENSOR, PIPELINE, {"zero_optimization": {"stage": 3}}],
}
FURTHER_FACTORS: Factors = {
    "further": [{"mtp_num_layers": 1}, {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.5}],
    "attention": [{}, {"num_kv_heads": 2}, {"pos_emb": "alibi"}, {"pos_emb": "rpe"}, *_LATENT_KINDS[1:]],
    **{name: values for name, values in _AROUND.items() if name not in ("types", "window")},
    "layout": [TENSOR, PIPELINE, {"zero_optimization": {"stage": 3}}],
}
APART_FACTORS: Factors = {
    "kinds": [
        {"num_layers": 3, "attention_config": kinds, "mamba_num_groups": 2, "mamba_head_dim": 16, **more}
        for kinds, more in (
            (["mamba2", "attention", "mlp"], {"mamba_dt_limit": [0.01, 0.5], "mamba_use_bias_in_linears": True}),
            (["attention", "mlp", "mamba2"], {"mamba_norm_before_gate": True, "mamba_state_dim": 24}),
            (["mlp", "mamba2", "attention"], {"mamba_use_bias_in_conv": False, "mamba_num_heads": 12}),
        )
    ],
    "positions": [{"pos_emb": name} for name in ("none", "rotary", "alibi", "learned")],
    "experts": [
        {},
        {**EXPERTS, "moe_top_k": 2, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    ],
    "activation": [{"activation": "squared_relu"}, {"activation": "swiglu", "mlp_multiple_of": 4}],
    **{name: _AROUND[name] for name in ("norm", "factors", "tying", "dropout", "recompute", "window", "bounds")},
    **{name: FACTORS[name] for name in ("gate", "heads")},
    "layout": [TENSOR, PIPELINE, {"zero_optimization": {"stage": 3}}],
}
TABLES: dict[str, tuple[Factors, int]] = {
    "all": (FACTORS, 120),
    "latents": (LATENT_FACTORS, 12),
    "gated delta nets": (DELTA_FACTORS, 12),
    "further tokens": (FURTHER_FACTORS, 12),
    "blocks of one sublayer": (APART_FACTORS, 12),
}
"""Name -> factors, and the least number of configurations that hold their pairs. The last three parts need others."""
KINKED, AT_A_KINK = ("relu", "reglu"), 1e-3
"""Activations whose derivative jumps at 0, and how far the gradient norm of these small models moves when rounding
moves one feature across: one process with another epsilon in the seventh digit moves as far.
"""
Choice = dict[str, int]


def pairs_of(choice: Choice, factors: Factors) -> set[tuple[tuple[str, int], tuple[str, int]]]:
    """The pairs of settings that a choice holds."""
    return set(itertools.combinations(((name, choice[name]) for name in factors if name in choice), 2))


def keys_of(choice: Choice, factors: Factors) -> Keys:
    keys = dict(BASE)
    for name, values in factors.items():
        if name != "layout" and name in choice:
            keys |= values[choice[name]]
    return keys


def refused(choice: Choice, factors: Factors) -> bool:
    """Whether no run may have this: experts share one activation, and latent attention sums its keys alone."""
    keys = keys_of(choice, factors)
    learns = keys.get("activation") == "xielu" and "moe_num_experts" in keys
    return learns or ("multi_latent_attention" in keys and "softmax_type" in keys)


def every_pair(factors: Factors) -> set[tuple[tuple[str, int], tuple[str, int]]]:
    """The pairs of settings that a run may have."""
    every = [[(name, at) for at in range(len(values))] for name, values in factors.items()]
    pairs = {pair for first, second in itertools.combinations(every, 2) for pair in itertools.product(first, second)}
    return {pair for pair in pairs if not refused(dict(pair), factors)}


def covering(factors: Factors) -> list[Choice]:
    """Choices that hold every pair of settings: each begins with a pair that is missing and adds the most of others."""
    missing = every_pair(factors)
    chosen: list[Choice] = []
    while missing:
        choice: Choice = dict(min(missing))
        for name, values in factors.items():
            if name not in choice:
                allowed = [at for at in range(len(values)) if not refused({**choice, name: at}, factors)]
                gains = {at: len(pairs_of({**choice, name: at}, factors) & missing) for at in allowed}
                best = [at for at, gain in gains.items() if gain == max(gains.values())]
                choice[name] = best[len(chosen) % len(best)]
        chosen.append(choice)
        missing -= pairs_of(choice, factors)
    return chosen


CHOICES = {table: covering(factors) for table, (factors, _) in TABLES.items()}
GROUPS = [(table, first) for table, choices in CHOICES.items() for first in range(0, len(choices), GROUP)]


@pytest.mark.parametrize("table", TABLES)
def test_every_pair_is_held(table: str) -> None:
    factors, least = TABLES[table]
    held = set().union(*(pairs_of(choice, factors) for choice in CHOICES[table]))
    assert held == every_pair(factors)
    assert not any(refused(choice, factors) for choice in CHOICES[table])
    sizes = [len(values) for values in factors.values()]
    assert len(held) >= 0.9 * sum(first * second for first, second in itertools.combinations(sizes, 2))
    assert len(CHOICES[table]) >= least


@pytest.mark.parametrize(("table", "first"), GROUPS)
def test_they_learn_and_layouts_agree(table: str, first: int) -> None:
    factors = TABLES[table][0]
    group = {str(number): choice for number, choice in enumerate(CHOICES[table])}
    group = dict(list(group.items())[first : first + GROUP])
    cases = {name: keys_of(choice, factors) for name, choice in group.items()}
    alone: Curves = run_distributed(train, 1, cases, {}, timeout=400)[0]
    for name, curve in alone.items():
        assert all(math.isfinite(loss) for loss, _ in curve), cases[name]
        assert curve[-1][0] < curve[0][0], cases[name]
    for at, layout in enumerate(factors["layout"]):
        exact = {
            name: keys
            for name, keys in cases.items()
            if group[name]["layout"] == at and not keys.get("hidden_dropout") and not keys.get("attention_dropout")
        }
        found: Curves = run_distributed(train, 2, exact, layout, timeout=400)[0]
        for name, keys in exact.items():
            agree(found, {name: alone[name]}, norms=AT_A_KINK if keys.get("activation") in KINKED else 1e-4)
