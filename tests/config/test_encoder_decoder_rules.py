"""What train_impl: t5 decides of a model, and what an encoder-decoder cannot have: each rule in its own words."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.small import errors, resolved

T5: dict[str, Any] = {
    "train_impl": "t5",
    "pack_impl": "unpacked",
    "num_layers": None,
    "seq_length": None,
    "max_position_embeddings": None,
    "encoder_num_layers": 1,
    "decoder_num_layers": 2,
    "encoder_seq_length": 32,
    "decoder_seq_length": 16,
}
CASES: list[tuple[dict[str, Any], str]] = [
    ({"encoder_num_layers": None}, "train_impl: t5 needs it; give encoder_num_layers and decoder_num_layers"),
    ({"decoder_seq_length": None}, "train_impl: t5 needs it; give encoder_seq_length and decoder_seq_length"),
    ({"decoder_num_layers": 0}, "this must be at least 1"),
    ({"num_layers": 4}, "it is the sum of encoder_num_layers and decoder_num_layers, 3; leave it out"),
    ({"seq_length": 32}, "it is the sum of encoder_seq_length and decoder_seq_length, 48; leave it out"),
    ({"train_impl": "normal", "num_layers": 2, "seq_length": 32}, "one stack of blocks has no encoder beside it"),
    ({"max_position_embeddings": 20}, "it is less than a sequence = 32"),
    ({"attention_mask": "bidirectional"}, "sees the tokens that train_impl: normal asks it for"),
    ({"attention_config": [[["local"], 3]]}, "by kind global"),
    ({"pos_emb": "rpe"}, "its biases are those of earlier tokens alone; use relative, learned or rotary"),
    ({"pos_emb": "rotary", "rope_scaling": {"type": "linear", "factor": 2.0}}, "different lengths to scale to"),
    ({"sliding_window_width": 8}, "a window is over earlier tokens"),
    ({"attn_logit_softcapping": 30.0}, "its cross attention has no such option"),
    ({"multi_latent_attention": True, "pos_emb": "rotary"}, "its cross attention has keys and values of heads"),
    ({"use_qk_layernorm": True}, "its cross attention has no such option"),
    ({"softmax_type": "off-by-one"}, "its encoder sums the keys alone"),
    ({"mtp_num_layers": 1}, "only the loss of the next token has further tokens"),
    ({"norm_placement": "output"}, "its three norms are before attention, cross attention and MLP"),
    ({"softmax_type": "off-by-one"}, "its encoder sums the keys alone"),
    ({"gpt_j_residual": True}, "cross attention follows attention, and the MLP both"),
    ({"num_token_types": 2}, "its samples have no segments"),
    ({"lora": {"rank": 4}}, "adapters are trained beside a causal model"),
    ({"moe_num_experts": 4}, "its router would balance padding"),
    ({"compile": True}, "blocks of two stacks have inputs of two lengths"),
    ({"curriculum_learning": {"enabled": True}}, "a sample that is cut loses its decoder's part"),
    ({"checkpoint_validation_with_forward_pass": True}, "the fixed input of that check is one sequence"),
    (
        {"optimizer": {"type": "Muon", "params": {"lr": 0.001, "qk_clip_threshold": 100}}},
        "qk_clip_threshold bounds the scores of one stack",
    ),
    ({"mask_prob": 1.0}, "it must be above 0 and below 1"),
    ({"short_seq_prob": 1.5}, "it must be from 0 to 1"),
    ({"mask_mean_words": 0.5}, "it must be at least 1"),
    ({"encoder_seq_length": 6}, "a text has at least 8 tokens"),
    ({"decoder_seq_length": 6}, "usually are 7 tokens, which this would cut; raise it to 7 or more"),
    ({"pack_impl": "packed"}, "set pack_impl: unpacked"),
    ({"train_data_paths": ["a"], "train_label_data_paths": ["b"]}, "the labels are the tokens of the spans"),
    ({"char_level_ppl": True}, "the loss is that of spans"),
    ({"eval_tasks": ["lambada"]}, "does not continue the text that it reads"),
    ({"user_script": "evaluate.py", "load": "somewhere"}, "does not continue the text that it reads"),
    ({"user_script": "generate.py", "load": "a", "recompute": True}, "a source and what follows are two sequences"),
    ({"user_script": "generate.py", "load": "a", "text_gen_type": "precompute"}, "use input-file or interactive"),
]
LAYOUTS: list[tuple[dict[str, Any], str]] = [
    ({"context_parallel_size": 2}, "its two sequences are not shared out; use model_parallel_size"),
    ({"te_columnparallel": True}, "Transformer Engine's layers are set up as causal"),
    ({"model_parallel_size": 2, "num_kv_heads": 1}, "cross attention shares no key head among 2 tensor-parallel ranks"),
    (
        {"model_parallel_size": 2, "sequence_parallel": True, "encoder_seq_length": 33, "decoder_seq_length": 15},
        "it does not divide into 2 shards",
    ),
    ({"user_script": "generate.py", "load": "a", "pipe_parallel_size": 2}, "generates on one stage"),
]


@pytest.mark.parametrize(("changes", "reported"), CASES)
def test_rule(changes: dict[str, Any], reported: str) -> None:
    lines = errors(**{**T5, **changes})
    assert any(reported in line for line in lines), "\n".join(lines)


@pytest.mark.parametrize(("changes", "reported"), LAYOUTS, ids=[case[1][:50] for case in LAYOUTS])
def test_layout_rule(changes: dict[str, Any], reported: str) -> None:
    lines = errors(2, **{**T5, **changes})
    assert any(reported in line for line in lines), "\n".join(lines)


def test_sizes_follow_from_those_of_the_stacks() -> None:
    config = resolved(**T5).config
    model = config.model
    assert (model.num_layers, model.seq_length, model.max_position_embeddings) == (3, 48, 32)
    assert (model.attention_mask, model.lm_head, config.data.mask_max_ngram) == ("causal", "linear", 10)
    assert resolved(**T5, mask_max_ngram=4).config.data.mask_max_ngram == 4


def test_every_layout_is_allowed() -> None:
    layouts: list[dict[str, Any]] = [
        {"model_parallel_size": 2, "sequence_parallel": True},
        {"pipe_parallel_size": 2},
        {"zero_optimization": {"stage": 3}},
        {"checkpoint_activations": True, "precision": "bfloat16"},
        {"user_script": "generate.py", "load": "somewhere", "model_parallel_size": 2},
    ]
    for layout in layouts:
        assert errors(2, **{**T5, **layout}) == []
