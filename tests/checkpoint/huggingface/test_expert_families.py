"""Families with experts train, generate and run on several ranks as they do in transformers.

Losses of the routers are off on both sides: transformers adds them up in another way.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.config import Resources, resolve
from megatron.errors import ConfigError
from megatron.param_table import ModelDims
from tests.checkpoint.huggingface import family_runs
from tests.checkpoint.huggingface.family_runs import (
    LENGTH,
    Found,
    compare_greedy_text,
    compare_steps,
    settings_of,
    theirs,
)
from tests.checkpoint.huggingface.models import MIXTURES, save
from tests.layouts import pick

LAYOUTS = {**family_runs.LAYOUTS, **pick("data 2, experts 2, ZeRO 2")}


@pytest.fixture(scope="module")
def expected() -> dict[str, Found]:
    return {name: theirs(name) for name in MIXTURES}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_are_those_of_torch(layout: str, expected: dict[str, Found], tmp_path: Path) -> None:
    compare_steps(expected, *LAYOUTS[layout], tmp_path)


@pytest.mark.parametrize("name", MIXTURES)
def test_greedy_text_is_theirs(name: str, tmp_path: Path) -> None:
    compare_greedy_text(name, tmp_path)


def test_blocks_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """As public GLM-4.5 folders have one behind the last block."""
    folder, settings = settings_of("glm4_moe", tmp_path)
    stored = load_file(folder / "model.safetensors")
    keys = set(Folder.open(folder).weights(dims_of(settings)).keys())
    stored["model.layers.4.eh_proj.weight"] = torch.ones(64, 128)
    stored["model.layers.4.mlp.gate.weight"] = torch.ones(8, 64)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert Folder.open(folder).weights(dims_of(settings)).keys() == keys


def test_modules_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """As the public Qwen3-Next folders have one beside the blocks."""
    folder, settings = settings_of("qwen3_next", tmp_path)
    keys = set(Folder.open(folder).weights(dims_of(settings)).keys())
    stored = load_file(folder / "model.safetensors")
    stored |= {"mtp.fc.weight": torch.ones(64, 128), "mtp.layers.0.self_attn.q_proj.weight": torch.ones(192, 64)}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert Folder.open(folder).weights(dims_of(settings)).keys() == keys


def dims_of(settings: dict[str, Any]) -> ModelDims:
    config = resolve([], {**settings, "seq_length": LENGTH, "user_script": "generate.py"}, Resources(1)).config
    return ModelDims.of(config.model, config.moe, config.mixers)


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("olmoe", "clip_qkv", 8.0, "clip_qkv = 8.0: only None can be taken over"),
        ("qwen3_moe", "use_sliding_window", True, "use_sliding_window = True: only False can be taken over"),
        ("qwen3_moe", "mlp_only_layers", [0, 1, 2, 3], "no block has experts, so this is a dense model"),
        ("qwen3_next", "hidden_act", "gelu", "hidden_act = 'gelu': only 'silu' can be taken over"),
        (
            "qwen3_next",
            "layer_types",
            ["full_attention"] * 3,
            "only one of full_attention and linear_attention for each",
        ),
        ("qwen2_moe", "num_experts", 1, "one expert is a plain MLP, and none is a dense model"),
        ("deepseek_v3", "rms_norm_eps", 1e-5, "the norms of latents have 1e-06"),
        ("deepseek_v3", "scoring_func", "softmax", "scoring_func = 'softmax': only 'sigmoid' can be taken over"),
        ("deepseek_v2", "topk_method", "noaux_tc", "it is greedy or group_limited_greedy"),
        ("deepseek_v2", "norm_topk_prob", True, "norm_topk_prob = True: only False can be taken over"),
        ("deepseek_v2", "num_key_value_heads", 2, "num_key_value_heads = 2: only 4 can be taken over"),
        ("nemotron_h", "tie_word_embeddings", True, "tie_word_embeddings = True: only False can be taken over"),
        ("nemotron_h", "moe_latent_size", 32, "moe_latent_size = 32: only None can be taken over"),
        ("nemotron_h", "n_shared_experts", 2, "n_shared_experts = 2: only 1 can be taken over"),
        ("nemotron_h", "hybrid_override_pattern", "ME*-EE", "it contradicts hybrid_override_pattern"),
        (
            "nemotron_h",
            "layers_block_type",
            ["mamba", "conv"],
            "the blocks of a pattern are linear_attention, mamba, f",
        ),
        ("nemotron_h", "num_hidden_layers", 7, "num_hidden_layers = 7: the pattern has 6 blocks"),
        ("nemotron_h", "attention_head_dim", 32, "attention_head_dim = 32: transformers reads head_dim = 24"),
        ("nemotron_h", "time_step_limit", [0.0, 0.1], "transformers bounds steps by time_step_min from below"),
        ("nemotron_h", "mamba_d_conv", 3, "conv_kernel = 3: only 4 can be taken over"),
        ("glm4_moe", "n_shared_experts", 0, "only models with shared experts can be taken over"),
    ],
)
def test_what_we_have_not_is_refused_by_name(name: str, key: str, value: object, expected: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ConfigError, match=expected):
        Folder.open(tmp_path).settings()
