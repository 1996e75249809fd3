"""Laws of configuration keys: each is explained, says what it counts, and is read or known to be unread."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence

from megatron.config import FIELDS
from megatron.config.config import FieldInfo
from megatron.config.validation.unsupported import FAMILIES, GAPS, IGNORED_HINTS, UNUSED_KEYS
from tests.architecture.source import PRODUCT, Source, sample

# Whole numbers that count nothing: names of things, seeds, factors.
COUNT_NOTHING = frozenset(
    {
        "local_rank",
        "master_port",
        "max_restarts",
        "num_unique_layers",
        "online_dataserver_ports",
        "opt_pos_emb_offset",
        "rank",
        "rotary_emb_base",
        "seed",
        "serve_port",
        "weight_server_port",
        "zero_stage",
    }
)

ABOUT_KEYS = ("megatron/config/schema/", "megatron/config/validation/unsupported.py", "megatron/config/renamed_keys.py")

# Keys that only say how a feature works, by the key that turns the feature on (with `:name` where a name does). As long
# as the feature is not built they may wait unread; once it is, each of them must be read.
FEATURES: dict[str, tuple[str, ...]] = {
    "attention_config:gmlp": ("gmlp_attn_dim",),
    "attention_config:mamba": (
        "mamba_selective_fp32_params",
        "mamba_use_bias_in_conv",
        "mamba_use_bias_in_linears",
    ),
    "attention_config:gated_delta_net": (
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
    ),
    "attention_config:rwkv": ("dim_att", "ffn_dim", "head_size"),
    "moe_num_experts": (
        "moe_aux_loss_coeff",
        "moe_capacity_factor",
        "moe_eval_capacity_factor",
        "moe_expert_interval",
        "moe_expert_parallel_size",
        "moe_jitter_eps",
        "moe_min_capacity",
        "moe_router_type",
        "moe_z_loss_coeff",
    ),
    "norm:scalenorm": ("scalenorm_epsilon",),
    "pos_emb:rpe": ("rpe_max_distance", "rpe_num_buckets"),
    "pos_train_data_paths": (
        "neg_test_data_paths",
        "neg_test_label_data_paths",
        "neg_train_data_paths",
        "neg_train_label_data_paths",
        "neg_valid_data_paths",
        "neg_valid_label_data_paths",
        "pos_test_data_paths",
        "pos_test_label_data_paths",
        "pos_train_label_data_paths",
        "pos_valid_data_paths",
        "pos_valid_label_data_paths",
    ),
    "serve_model_weights": ("online_dataserver_ips", "online_dataserver_ports"),
    "te_fp8_mha": ("te_fp8_amax_compute_algo", "te_fp8_amax_history_len", "te_fp8_format", "te_fp8_wgrad"),
    "text_gen_type": ("precompute_model_name",),
    "train_impl:dpo": ("dpo_beta", "dpo_fp32", "dpo_reference_free"),
    "train_impl:kto": ("kto_beta", "kto_desirable_weight", "kto_fp32", "kto_undesirable_weight"),
    "train_impl:reinforce": ("fp32_reinforce", "kl_div_beta", "kl_impl", "reinforce_leave_one_out"),
    "train_impl:rm": ("z_loss",),
}


def is_built(feature: str) -> bool:
    """Whether a feature of FEATURES works: no gap names it, or the family of parts lists the name."""
    key, _, name = feature.partition(":")
    return name in FAMILIES[key] if name else key not in {gap.key for gap in GAPS}


def explanation_complaints(catalog: Mapping[str, FieldInfo]) -> list[str]:
    """Keys without a sentence about them, and counts without a unit."""
    found = []
    for name, facts in catalog.items():
        if len(facts.doc.split()) < 2 or not facts.doc.endswith("."):
            found.append(f"{name}: its documentation is no sentence: {facts.doc!r}")
        counts = facts.annotation is int or str(facts.annotation).startswith("int")
        if counts and not facts.unit and name not in COUNT_NOTHING:
            found.append(f"{name}: a count needs a unit")
    return found


def read_names(sources: Iterable[Source]) -> set[str]:
    """Attributes that code reads and strings that it names, outside the sections that declare keys."""
    found = set()
    for source in sources:
        if source.within(*ABOUT_KEYS):
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def unread(keys: Iterable[str], sources: Sequence[Source], known: Iterable[str]) -> list[str]:
    """Keys that nothing reads although no table says so."""
    return sorted(set(keys) - read_names(sources) - set(known))


def waiting(features: Mapping[str, Sequence[str]]) -> set[str]:
    """Keys that may wait for their feature."""
    return {key for feature, keys in features.items() if not is_built(feature) for key in keys}


def test_every_key_is_explained() -> None:
    assert explanation_complaints(FIELDS) == []


def test_explanation_law_can_complain() -> None:
    def facts(doc: str, unit: str | None) -> dict[str, FieldInfo]:
        return {"a_key": FieldInfo("a_key", "model", int, 1, doc, unit)}

    assert explanation_complaints(facts("", "steps"))
    assert explanation_complaints(facts("Steps to run.", None))
    assert explanation_complaints(facts("Steps to run.", "steps")) == []


def test_every_key_is_read_or_known_to_be_unread() -> None:
    known = {gap.key for gap in GAPS} | IGNORED_HINTS.keys() | UNUSED_KEYS.keys() | waiting(FEATURES)
    assert unread(FIELDS, PRODUCT, known) == []


def test_reading_law_can_complain() -> None:
    reader = sample("megatron/data/dataset/gpt_dataset.py", "def f(data):\n    return data.split\n")
    section = sample("megatron/config/schema/data.py", "split: str\nx.data_path\n")
    assert unread(["split", "data_path"], [reader, section], []) == ["data_path"]
    assert unread(["split", "data_path"], [reader, section], ["data_path"]) == []


def test_keys_wait_only_for_features_that_are_not_built() -> None:
    assert waiting({"norm:layernorm": ["a"], "seed": ["b"]}) == set()
    assert waiting({"norm:no_such_norm": ["a"], GAPS[0].key: ["b"]}) == {"a", "b"}


def test_tables_name_keys_that_exist() -> None:
    named = {feature.partition(":")[0] for feature in FEATURES} | {key for keys in FEATURES.values() for key in keys}
    assert sorted((named | COUNT_NOTHING) - FIELDS.keys()) == []
