"""What train_impl: bert decides of a model, and what an encoder cannot have: each rule in its own words."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.small import errors, resolved

BERT: dict[str, Any] = {"train_impl": "bert", "pack_impl": "unpacked"}
CASES: list[tuple[dict[str, Any], str]] = [
    (
        {"train_impl": "normal", "attention_mask": "bidirectional"},
        "sees the tokens that train_impl: normal asks it for",
    ),
    ({"attention_mask": "causal"}, "train_impl: bert asks for tokens from both sides of them"),
    ({"lm_head": "linear"}, "train_impl: bert has the head masked"),
    ({"train_impl": "normal", "lm_head": "masked"}, "train_impl: normal has the head linear"),
    ({"train_impl": "normal", "bert_binary_head": True}, "the order of segments is learned with train_impl: bert"),
    ({"num_token_types": 1}, "two segments need two types"),
    ({"attention_config": [[["local"], 2]]}, "by kind global"),
    ({"pos_emb": "alibi"}, "its biases of scores are those of earlier tokens"),
    ({"pos_emb": "rpe"}, "its biases of scores are those of earlier tokens"),
    ({"sliding_window_width": 8}, "a window is over earlier tokens"),
    (
        {"layer_types": ["a", "a"], "layer_type_options": {"a": {"sliding_window_width": 8}}},
        "a window is over earlier tokens",
    ),
    ({"attn_logit_softcapping": 8.0}, "its attention and its head have no bounds"),
    ({"final_logit_softcapping": 8.0}, "its attention and its head have no bounds"),
    (
        {
            "layer_types": [[["near", "full"], 1]],
            "layer_type_options": {"near": {"sliding_window_width": 8}, "full": {}},
        },
        "layer_type_options = ",
    ),
    ({"attn_logit_softcapping": 30.0}, "its attention has no bound of scores"),
    ({"final_logit_softcapping": 30.0}, "its logits have a bias and no bound"),
    ({"logit_scale": 0.5}, "which the factor would leave out"),
    ({"no_weight_tying": True}, "masked tokens are predicted by the word embedding's matrix"),
    ({"lora": {"rank": 4}}, "adapters are trained beside a causal model"),
    ({"soft_prompt_tuning": {"num_tokens": 4}}, "adapters are trained beside a causal model"),
    ({"moe_num_experts": 4}, "its router would balance padding"),
    ({"curriculum_learning": {"enabled": True}}, "a sample that is cut loses its second segment"),
    ({"mask_prob": 1.0}, "it must be above 0 and below 1"),
    ({"short_seq_prob": 1.5}, "it must be from 0 to 1"),
    ({"mask_max_ngram": 0}, "it must be at least 1"),
    ({"seq_length": 6, "max_position_embeddings": 6}, "a masked sample has at least 8 tokens"),
    ({"pack_impl": "packed"}, "set pack_impl: unpacked, or bert_binary_head: false"),
    ({"pack_impl": "pack_until_overflow"}, "masked samples are not made this way"),
    ({"train_data_paths": ["a"], "train_label_data_paths": ["b"]}, "the labels are the masked tokens"),
    ({"char_level_ppl": True}, "the loss is that of masked tokens"),
    ({"eval_tasks": ["lambada"]}, "predicts masked tokens and does not continue a text"),
    ({"user_script": "generate.py", "load": "somewhere"}, "predicts masked tokens and does not continue a text"),
    ({"user_script": "evaluate.py", "load": "somewhere"}, "predicts masked tokens and does not continue a text"),
]


@pytest.mark.parametrize(("changes", "reported"), CASES, ids=[case[1][:50] for case in CASES])
def test_rule(changes: dict[str, Any], reported: str) -> None:
    lines = errors(**{**BERT, **changes})
    assert any(reported in line for line in lines), "\n".join(lines)


@pytest.mark.parametrize(
    ("changes", "reported"),
    [
        ({"context_parallel_size": 2}, "segments end anywhere in a sequence"),
        ({"te_columnparallel": True}, "Transformer Engine's layers are set up as causal"),
    ],
)
def test_layout_rule(changes: dict[str, Any], reported: str) -> None:
    lines = errors(2, **{**BERT, **changes})
    assert any(reported in line for line in lines), "\n".join(lines)


@pytest.mark.parametrize(
    ("given", "derived"),
    [
        ({"train_impl": "normal"}, ("causal", "linear", False, 0)),
        ({}, ("bidirectional", "masked", True, 2)),
        ({"bert_binary_head": False}, ("bidirectional", "masked", False, 0)),
        ({"bert_binary_head": False, "pack_impl": "packed"}, ("bidirectional", "masked", False, 0)),
        ({"num_token_types": 3}, ("bidirectional", "masked", True, 3)),
    ],
)
def test_the_objective_decides_the_model(given: dict[str, Any], derived: tuple[Any, ...]) -> None:
    model = resolved(**{**BERT, **given}).config.model
    assert (model.attention_mask, model.lm_head, model.bert_binary_head, model.num_token_types) == derived


def test_every_layout_is_allowed() -> None:
    layouts: list[dict[str, Any]] = [
        {"model_parallel_size": 2, "sequence_parallel": True},
        {"pipe_parallel_size": 2},
        {"zero_optimization": {"stage": 3}},
        {"checkpoint_activations": True, "precision": "bfloat16"},
    ]
    for layout in layouts:
        assert errors(2, **{**BERT, **layout}) == []
