"""What latent attention asks for, and what it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config import Resources, resolve
from megatron.errors import ConfigError
from megatron.param_table import ModelDims

SCALING = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale_all_dim": 1.0}
LATENT: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "pos_emb": "rotary",
    "multi_latent_attention": True,
    "user_script": "generate.py",
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank = 0: it must be at least 1"),
        ({"q_lora_rank": 0}, "q_lora_rank = 0: it must be at least 1"),
        ({"qk_pos_emb_head_dim": 7}, "rotary positions rotate pairs of features"),
        ({"kv_channels": 64}, "a head has qk_head_dim . qk_pos_emb_head_dim = 192 features"),
        ({"num_kv_heads": 2}, "keys and values of all 4 heads"),
        ({"pos_emb": "alibi"}, "its positions are rotary ones"),
        ({"rotary_pct": 0.5}, "qk_pos_emb_head_dim says how many features are rotated"),
        ({"use_qk_layernorm": True}, "its norms are on the latents"),
        ({"attention_config": ["local", "global"]}, "blocks of kind local have no layout"),
        ({"lora": {"rank": 4}}, "there is no query_key_value"),
        ({"te_mha": True}, "Transformer Engine's attention has one joint projection"),
        ({"model_parallel_size": 8, "global_num_gpus": 8}, "num_attention_heads = 4: model_parallel_size = 8"),
        (
            {"layer_types": ["a", "b"], "layer_type_options": {"a": {"rope_scaling": SCALING}, "b": {}}},
            "mscale_all_dim changes the scores of all blocks",
        ),
        (
            {
                "optimizer": {"type": "Muon", "params": {"lr": 0.01, "qk_clip_threshold": 100}},
                "use_bias_in_attn_linear": False,
                "user_script": "train.py",
                "train_iters": 1,
                "train_micro_batch_size_per_gpu": 1,
            },
            "qk_clip_threshold scales the joint projection",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        resolve([], {**LATENT, **changes}, Resources(8 if "global_num_gpus" in changes else 1))


def test_a_head_is_as_wide_as_its_parts() -> None:
    config = resolve([], LATENT, Resources(1)).config
    assert config.model.kv_channels == 128 + 64
    dims = ModelDims.of(config.model)
    assert (dims.query_size, dims.value_size, dims.rotary_width) == (4 * 192, 4 * 128, 64)


def test_the_cache_of_deepseek_v3_is_small() -> None:
    """512 + 64 numbers a token and block, in place of 128 heads of keys of 192 and values of 128 features."""
    sizes = {"hidden_size": 7168, "num_attention_heads": 128, "num_layers": 61, "q_lora_rank": 1536}
    dims = ModelDims.of(resolve([], {**LATENT, **sizes}, Resources(1)).config.model)
    assert dims.cached_per_token(1) == dims.cached_per_token(8) == 576
    assert dims.cached_per_token(1) <= 0.02 * 128 * (192 + 128)
