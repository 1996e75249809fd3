"""Small models of transformers with every weight and bias drawn at random, and their folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from tests.checkpoint.huggingface.gated_models import GATED_DENSE, GATED_MIXTURES

VOCABULARY = 96
_NEOX = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_NEOX, "intermediate_size": 88, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
_SCALED = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
_SCALED |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}
_MAMBA2 = {**_MAMBA, "num_heads": 8, "head_dim": 16, "state_size": 12}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}

_OPT = {**_NEOX, "word_embed_proj_dim": 64, "ffn_dim": 100, "max_position_embeddings": 64, "dropout": 0.0}


def _neox(**changes: object) -> PreTrainedModel:
    reported = {**_NEOX, "intermediate_size": 176, "max_position_embeddings": 64, **changes}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**reported))


def _llama(**changes: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_LLAMA, **changes}))


_NEW = {**_LLAMA, "num_hidden_layers": 4, "num_key_value_heads": 2, "pad_token_id": None}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500000.0}
_OWN_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
}
_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]


def _without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in _NEW.items() if key not in keys}


DENSE: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**_NEW, use_sliding_window=True, sliding_window=7, max_window_layers=2)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_NEW,
            head_dim=16,
            query_pre_attn_scalar=20,
            sliding_window=6,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=4.0,
            attn_implementation="eager",
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_NEW,
            head_dim=24,
            query_pre_attn_scalar=20,
            sliding_window=6,
            layer_types=_TYPES,
            rope_parameters=_OWN_BASES,
        )
    ),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_NEW)),
    "olmo3": lambda: Olmo3ForCausalLM(
        Olmo3Config(
            **_NEW,
            sliding_window=6,
            rope_parameters={
                "full_attention": _YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            },
        )
    ),
    "smollm3": lambda: SmolLM3ForCausalLM(
        SmolLM3Config(**_NEW, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=6)
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_NEW, sliding_window=6)),
    "phi3, part of the head, as many kv heads": lambda: Phi3ForCausalLM(
        Phi3Config(**_without("num_key_value_heads"), rope_parameters={"partial_rotary_factor": 0.5, **_PLAIN})
    ),
    "cohere2": lambda: Cohere2ForCausalLM(
        Cohere2Config(**_without("rms_norm_eps"), sliding_window=6, logit_scale=0.25, attention_bias=True)
    ),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(
            **_NEW,
            embedding_multiplier=3.0,
            residual_multiplier=0.3,
            attention_multiplier=0.2,
            logits_scaling=3.0,
        )
    ),
    "starcoder2": lambda: Starcoder2ForCausalLM(Starcoder2Config(**_without("rms_norm_eps"), sliding_window=6)),
    "nemotron": lambda: NemotronForCausalLM(NemotronConfig(**_without("rms_norm_eps"), attention_bias=True)),
    "apertus": lambda: ApertusForCausalLM(ApertusConfig(**_NEW, attention_bias=True)),
    **GATED_DENSE,
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**_MAMBA2, n_groups=2, chunk_size=8)),
}
"""The dense families whose blocks differ from LLaMA's in more than their numbers -> makes the model."""
_GLM = {
    **_NEW,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "rope_parameters": {"partial_rotary_factor": 0.5, **_PLAIN},
}
_LATENT = {
    **_without("num_key_value_heads"),
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "rms_norm_eps": 1e-6,
    "first_k_dense_replace": 1,
}
_MSCALES = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
}
_HYBRID = ["linear_attention", "moe", "full_attention", "mlp", "moe", "linear_attention"]
_NEMOTRON_H = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 88,
    "max_position_embeddings": 64,
    "ssm_state_size": 12,
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "pad_token_id": None,
}
MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **_NEW,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            decoder_sparse_step=2,
        )
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_NEW,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            mlp_only_layers=[0],
            head_dim=24,
        )
    ),
    **GATED_MIXTURES,
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**_NEW, num_experts=8, num_experts_per_tok=3)),
    "glm4_moe": lambda: Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **_GLM,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            n_shared_experts=2,
            attention_bias=True,
            use_qk_norm=True,
        )
    ),
    "deepseek_v2": lambda: DeepseekV2ForCausalLM(
        DeepseekV2Config(
            **_LATENT,
            q_lora_rank=28,
            topk_method="group_limited_greedy",
            routed_scaling_factor=1.5,  # with 1 two groups of one token have the same score, and rounding chooses
            n_group=4,
            topk_group=2,
            rope_parameters={key: value for key, value in _MSCALES.items() if "mscale" not in key},
        )
    ),
    "deepseek_v2, lite": lambda: DeepseekV2ForCausalLM(
        DeepseekV2Config(**_LATENT, q_lora_rank=None, routed_scaling_factor=2.0, attention_bias=True)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_LATENT, q_lora_rank=28, n_group=4, topk_group=2, attention_bias=True, rope_parameters=_MSCALES
        )
    ),
    "deepseek_v3, wide values": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**{**_LATENT, "v_head_dim": 24}, q_lora_rank=None, n_group=1, topk_group=1)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **_NEW,
            head_dim=16,
            num_local_experts=8,
            num_experts_per_tok=3,
            sliding_window=6,
            rope_parameters={**_YARN, "truncate": False},
        )
    ),
    "nemotron_h": lambda: NemotronHForCausalLM(
        NemotronHConfig(**_NEMOTRON_H, layers_block_type=_HYBRID, n_group=2, routed_scaling_factor=2.5)
    ),
    "glm4_moe, one group, all blocks": lambda: Glm4MoeForCausalLM(Glm4MoeConfig(**_GLM, first_k_dense_replace=0)),
}
"""Families with experts beside Mixtral -> makes the model."""
MODELS = {
    "neox": lambda: _neox(rotary_pct=0.25),
    "neox, one residual, tied": lambda: _neox(use_parallel_residual=False, rotary_pct=1.0, tie_word_embeddings=True),
    "neox without attention biases": lambda: _neox(attention_bias=False, hidden_act="gelu_pytorch_tanh"),
    "llama, as many kv heads": lambda: _llama(num_key_value_heads=4),
    "llama, grouped, biases": lambda: _llama(
        num_key_value_heads=2, attention_bias=True, mlp_bias=True, intermediate_size=128
    ),
    "llama, wide heads, tied": lambda: _llama(num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_LLAMA, num_key_value_heads=2, sliding_window=None)),
    "mistral with a window": lambda: MistralForCausalLM(
        MistralConfig(**_LLAMA, num_key_value_heads=2, sliding_window=8)
    ),
    "llama 3.1, scaled positions": lambda: _llama(num_key_value_heads=2, rope_parameters=_SCALED),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_LLAMA, num_key_value_heads=2, head_dim=32)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**_LLAMA, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    ),
    "mpt": lambda: MptForCausalLM(
        MptConfig(vocab_size=VOCABULARY, d_model=64, n_layers=2, n_heads=4, max_seq_len=64, pad_token_id=None)
    ),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**_MAMBA, tie_word_embeddings=False)),
    "mamba, tied, no bias": lambda: MambaForCausalLM(MambaConfig(**_MAMBA, use_conv_bias=False)),
    "mamba2, tied, limits, biases": lambda: Mamba2ForCausalLM(
        Mamba2Config(
            **_MAMBA2,
            n_groups=4,
            tie_word_embeddings=True,
            use_bias=True,
            time_step_limit=(0.01, 0.5),
            use_conv_bias=False,
        )
    ),
    "nemotron_h, dense, biases": lambda: NemotronHForCausalLM(
        NemotronHConfig(
            **_NEMOTRON_H,
            layers_block_type=["mlp", "linear_attention", "full_attention", "mlp"],
            mlp_bias=True,
            use_bias=True,
            use_conv_bias=False,
            mlp_hidden_act="gelu",
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_OPT)),
    "opt, untied, no biases": lambda: OPTForCausalLM(
        OPTConfig(**_OPT, enable_bias=False, tie_word_embeddings=False, activation_function="gelu")
    ),
    "gpt2, untied, exact gelu": lambda: GPT2LMHeadModel(
        GPT2Config(**_GPT2, activation_function="gelu", tie_word_embeddings=False, n_inner=100)
    ),
    **DENSE,
    **MIXTURES,
}
"""Name -> makes the model."""


def make(name: str) -> PreTrainedModel:
    """The model with random weights, norms and biases."""
    torch.manual_seed(5)
    model = MODELS[name]().eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for called, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if called.endswith("linear_attn.A_log"):  # slow decays, so that states reach over the whole text
                parameter.sub_(3.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model


def save(name: str, folder: Path, **how: object) -> PreTrainedModel:
    """Makes the model and writes its folder as transformers does."""
    model = make(name)
    model.save_pretrained(folder, **how)
    return model


def tokens() -> torch.Tensor:
    """Token ids [3, 24]."""
    return torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(3))


OF_LATER_RELEASES = frozenset(name for name in MODELS if name.startswith(("mamba2", "nemotron_h", "qwen3_5")))
"""Those that 4.57.6 does not have, or computes otherwise (the norm of Mamba-2 is of all groups together there)."""
