"""Settings that fit every tensor and make another model: refused, or reported where they may be changed on purpose.

Breaks if: a key is no more compared, an alias of the same operation counts as another one, or a reader without
`finetune` is let through.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.load.model_check import same_model
from megatron.config import Resources, resolve
from megatron.errors import ConfigError

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "precision": "fp32",
    "tokenizer_type": "CharLevelTokenizer",
    "user_script": "generate.py",
}
ROTARY = {"pos_emb": "rotary"}
EXPERTS = {"moe_num_experts": 4, "moe_router_type": "topk", "moe_top_k": 2}
UPDATES = {"lora": {"rank": 4, "alpha": 16}}
FOUR_BITS = {"lora": {**UPDATES["lora"], "base": "nf4"}, "hidden_size": 64}
WHERE = Path("save/global_step3")


def flat(**values: Any) -> dict[str, Any]:
    return resolve([], {**BASE, **values}, Resources(1)).config.flat()


@pytest.mark.parametrize(
    ("key", "then", "now"),
    [
        ("num_attention_heads", {}, {"num_attention_heads": 2}),
        ("activation", {}, {"activation": "relu"}),
        ("activation", {"activation": "swiglu"}, {"activation": "geglu"}),
        ("norm", {"norm": "scalenorm"}, {"norm": "rmsnorm"}),
        ("gpt_j_residual", {}, {"gpt_j_residual": True}),
        ("attention_config", {}, {"attention_config": [[["local"], "all"]]}),
        ("pos_emb", {"pos_emb": "alibi"}, {"pos_emb": "none"}),
        ("rotary_pct", ROTARY, {**ROTARY, "rotary_pct": 0.25}),
        ("moe_top_k", EXPERTS, {**EXPERTS, "moe_top_k": 1}),
        ("moe_normalize_top_k", EXPERTS, {**EXPERTS, "moe_normalize_top_k": True}),
        ("lora", UPDATES, {"lora": {"rank": 4}}),
        ("lora", {**UPDATES, "hidden_size": 64}, FOUR_BITS),
        ("lora", FOUR_BITS, {**FOUR_BITS, "lora": {**UPDATES["lora"], "base": "int8"}}),
        ("softmax_type", {}, {"softmax_type": "off-by-one"}),
        ("attention_output_gate", {}, {"attention_output_gate": True}),
        ("value_residual", {}, {"value_residual": True}),
    ],
)
def test_another_model_is_refused(key: str, then: dict[str, Any], now: dict[str, Any], caplog: Any) -> None:
    stored, own = flat(**then), flat(**now)
    with pytest.raises(ConfigError, match=rf"{key} = .*save/global_step3 was trained with .*another model"):
        same_model(stored, own, WHERE, finetune=False)
    with caplog.at_level(logging.WARNING):
        same_model(stored, own, WHERE, finetune=True)
    assert f"{key} = " in caplog.text


@pytest.mark.parametrize(
    ("key", "now"),
    [
        ("rotary_emb_base", {"rotary_emb_base": 500000}),
        ("rope_scaling", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("layernorm_epsilon", {"layernorm_epsilon": 1e-6}),
    ],
)
def test_what_is_changed_on_purpose_is_reported(key: str, now: dict[str, Any], caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        same_model(flat(**ROTARY), flat(**ROTARY, **now), WHERE, finetune=False)
    assert f"{key} = " in caplog.text


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"attention_config": [[["flash"], "all"]]}, {}),
        ({"activation": "swish"}, {"activation": "silu"}),
        ({}, {"num_kv_heads": 4, "kv_channels": 8}),
        ({}, {"rotary_emb_base": 20000}),  # no rotary positions
        ({}, {"moe_router_type": "topk"}),  # no experts
        ({}, UPDATES),  # begun with finetune, or reported as tensors that are missing
        (FOUR_BITS, {**FOUR_BITS, **UPDATES}),  # a checkpoint has the expanded matrices
        (UPDATES, {"lora": {"rank": 8}}),  # reported as tensors of other shapes
        (UPDATES, {"lora": {"rank": 4, "alpha": 16.0, "dropout": 0.1}}),
        ({}, {"precision": "bfloat16", "hidden_dropout": 0.1, "max_position_embeddings": 16}),
    ],
)
def test_the_same_model_is_taken(then: dict[str, Any], now: dict[str, Any], caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        same_model(flat(**then), flat(**now), WHERE, finetune=False)
    assert not caplog.text


def test_an_older_checkpoint_says_less() -> None:
    same_model({}, flat(), WHERE, finetune=False)


@pytest.mark.parametrize(
    "now", [{"softmax_type": "off-by-one"}, {"activation": "swiglu", "glu_linear_offset": 1.0}, {"logit_scale": 0.5}]
)
def test_a_checkpoint_without_a_later_key_has_its_default(now: dict[str, Any]) -> None:
    own = flat(**now)
    key = list(now)[-1]
    stored = {name: value for name, value in own.items() if name != key}
    with pytest.raises(ConfigError, match=rf"{key} = .* was trained with (None|'vanilla'|0\.0|1\.0), and with another"):
        same_model(stored, own, WHERE, finetune=False)
    same_model({}, own, WHERE, finetune=False)  # a checkpoint that says nothing of its model


def test_a_change_of_tensors_is_no_matter_for_finetune() -> None:
    with pytest.raises(ConfigError, match="softmax_type = 'vanilla'") as reported:
        same_model(flat(softmax_type="learnable"), flat(), WHERE, finetune=False)
    assert "finetune" not in str(reported.value)
