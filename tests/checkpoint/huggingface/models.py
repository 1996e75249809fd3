"""Small models of transformers with every weight and bias drawn at random, and their folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 96
_NEOX = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_NEOX, "intermediate_size": 88, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
_SCALED = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
_SCALED |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}

_OPT = {**_NEOX, "word_embed_proj_dim": 64, "ffn_dim": 100, "max_position_embeddings": 64, "dropout": 0.0}


def _neox(**changes: object) -> PreTrainedModel:
    reported = {**_NEOX, "intermediate_size": 176, "max_position_embeddings": 64, **changes}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**reported))


def _llama(**changes: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_LLAMA, **changes}))


MODELS = {
    "neox": lambda: _neox(rotary_pct=0.25),
    "neox, one residual, tied": lambda: _neox(use_parallel_residual=False, rotary_pct=1.0, tie_word_embeddings=True),
    "neox without attention biases": lambda: _neox(attention_bias=False, hidden_act="gelu_pytorch_tanh"),
    "llama, as many kv heads": lambda: _llama(num_key_value_heads=4),
    "llama, grouped, biases": lambda: _llama(num_key_value_heads=2, attention_bias=True, mlp_bias=True),
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
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_OPT)),
    "opt, untied, no biases": lambda: OPTForCausalLM(
        OPTConfig(**_OPT, enable_bias=False, tie_word_embeddings=False, activation_function="gelu")
    ),
    "gpt2, untied, exact gelu": lambda: GPT2LMHeadModel(
        GPT2Config(**_GPT2, activation_function="gelu", tie_word_embeddings=False, n_inner=100)
    ),
}
"""Name -> makes the model."""


def make(name: str) -> PreTrainedModel:
    """The model with random weights, norms and biases."""
    torch.manual_seed(5)
    model = MODELS[name]().eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def save(name: str, folder: Path, **how: object) -> PreTrainedModel:
    """Makes the model and writes its folder as transformers does."""
    model = make(name)
    model.save_pretrained(folder, **how)
    return model


def tokens() -> torch.Tensor:
    """Token ids [3, 24]."""
    return torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(3))
