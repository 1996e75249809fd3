"""What config.json means where it leaves a key out, or calls it by another of its names.

`transformers` writes every key, model authors and other programs do not; what is left out has the value of the class.
A key that is null is left out where the class allows it, and an error elsewhere.

Source: the configuration classes of transformers 5.23 and 4.57.6, which agree in all of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.expert_defaults import EXPERT_ALIASES, EXPERT_DEFAULTS
from megatron.checkpoint.huggingface.family import Settings
from megatron.checkpoint.huggingface.mixer_defaults import MIXER_DEFAULTS
from megatron.errors import ConfigError, ConfigIssue

_NEOX: Settings = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
_LLAMA: Settings = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as heads
    "head_dim": None,  # hidden_size / heads
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 10000,
    "attention_dropout": 0.0,
}
_MISTRAL = _LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_MIXTRAL = _MISTRAL | {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
}
_QWEN3 = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN2 = {key: value for key, value in _QWEN3.items() if key not in ("head_dim", "attention_bias", "mlp_bias")} | {
    "head_dim": None,
    "layer_types": None,
}
_GEMMA2 = {key: value for key, value in _LLAMA.items() if key not in ("hidden_act", "mlp_bias")} | {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,  # a window in every second block, the first one
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": None,
}
_GEMMA3 = _GEMMA2 | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "sliding_window_pattern": None,  # 6: windows in all blocks but every sixth
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
_OLMO2 = {key: value for key, value in _LLAMA.items() if key != "mlp_bias"} | {
    "vocab_size": 50304,
    "rms_norm_eps": 1e-5,
}
_OLMO3 = _OLMO2 | {"sliding_window": 4096, "layer_types": None, "rope_theta": 500000}
_SMOLLM3 = _LLAMA | {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rope_theta": 2000000,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layers": None,  # rotary positions in all blocks but every no_rope_layer_interval-th
    "no_rope_layer_interval": 4,
    "layer_types": None,
}
_PHI3 = {key: value for key, value in _LLAMA.items() if key not in ("attention_bias", "mlp_bias")} | {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "sliding_window": None,
}
_COHERE2 = {key: value for key, value in _LLAMA.items() if key not in ("rms_norm_eps", "mlp_bias")} | {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "logit_scale": 0.0625,
    "sliding_window": 4096,
    "sliding_window_pattern": None,  # 4
    "layer_types": None,
}
_GRANITE = _LLAMA | {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
_STARCODER2 = {
    key: value for key, value in _LLAMA.items() if key not in ("rms_norm_eps", "attention_bias", "mlp_bias")
} | {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "use_bias": True,
    "tie_word_embeddings": True,
    "sliding_window": None,
}
_APERTUS = {key: value for key, value in _LLAMA.items() if key != "mlp_bias"} | {
    "vocab_size": 131072,
    "intermediate_size": 14336,
    "num_key_value_heads": None,
    "hidden_act": "xielu",
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "rope_theta": 12000000,
}
_NEMOTRON = {key: value for key, value in _LLAMA.items() if key != "rms_norm_eps"} | {
    "vocab_size": 256000,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_attention_heads": 48,
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
}
_GPT2: Settings = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,  # 4 x n_embd
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_OPT: Settings = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None,  # hidden_size
    "num_attention_heads": 12,
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}
_MPT: Settings = {
    "d_model": 2048,
    "n_heads": 16,
    "n_layers": 24,
    "expansion_ratio": 4,
    "max_seq_len": 2048,
    "vocab_size": 50368,
    "layer_norm_epsilon": 1e-5,
    "attn_config": None,
    "logit_scale": None,
    "no_bias": True,
    "tie_word_embeddings": True,
}
_MEGATRON_BERT: Settings = {
    "vocab_size": 29056,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
    "is_decoder": False,
    "add_cross_attention": False,
}
_BERT: Settings = {
    "classifier_dropout": None,
    **_MEGATRON_BERT,
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
_ROBERTA: Settings = {**_BERT, "vocab_size": 50265, "pad_token_id": 1}
_DPR: Settings = {
    **{key: value for key, value in _BERT.items() if key not in ("classifier_dropout", "tie_word_embeddings")},
    "projection_dim": 0,
}
_T5: Settings = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,  # as many as of the encoder
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "is_encoder_decoder": True,
    "is_decoder": False,
    "tie_word_embeddings": True,
}
DEFAULTS: Mapping[str, Settings] = {
    "gpt_neox": _NEOX,
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "mixtral": _MIXTRAL,
    "qwen3": _QWEN3,
    "qwen2": _QWEN2,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "olmo2": _OLMO2,
    "olmo3": _OLMO3,
    "smollm3": _SMOLLM3,
    "phi3": _PHI3,
    "cohere2": _COHERE2,
    "granite": _GRANITE,
    "starcoder2": _STARCODER2,
    "nemotron": _NEMOTRON,
    "apertus": _APERTUS,
    "gpt2": _GPT2,
    "opt": _OPT,
    "mpt": _MPT,
    **MIXER_DEFAULTS,
    **EXPERT_DEFAULTS,
    "megatron-bert": _MEGATRON_BERT,
    "bert": _BERT,
    "roberta": _ROBERTA,
    "dpr": _DPR,
    "t5": _T5,
}
"""model_type -> key -> the value of its class."""
ROTARY = frozenset({"rope_theta", "rotary_emb_base", "rotary_pct", "rope_local_base_freq", "partial_rotary_factor"})
_MAY_BE_NULL = frozenset(
    {
        *("num_key_value_heads", "head_dim", "sliding_window", "router_jitter_noise", "router_aux_loss_coef"),
        *("q_lora_rank", "n_group", "topk_group"),
        *("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"),
    }
)
"""Keys with a value of the class that may be null all the same."""
ALIASES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    "mpt": {"hidden_size": "d_model", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"},
    "mixtral": {"num_experts": "num_local_experts"},
    "t5": {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
    **EXPERT_ALIASES,
    "nemotron_h": {"layer_types": "layers_block_type", "num_local_experts": "n_routed_experts"},
}
"""model_type -> another name of a key -> the key."""


def completed(theirs: Mapping[str, Any], model_type: str, location: str) -> dict[str, Any]:
    """config.json with every key that we read, but those of ROTARY, which may be in a block of their own.

    Raises ConfigError for values that no model of the class can have.

    location: the file, for messages.
    """
    found = dict(theirs)
    issues = []
    for name, key in ALIASES.get(model_type, {}).items():
        if found.get(name) is None:
            continue
        if found.get(key) not in (None, found[name]):
            what = f"it is another name of {key}, which is {found[key]!r}"
            issues.append(ConfigIssue(what, key=name, value=found[name], location=location, hint="keep one of them"))
        found[key] = found[name]
    for key, usual in DEFAULTS[model_type].items():
        if key in ROTARY and key not in found:
            continue
        value = found.setdefault(key, usual)
        if not _fits(value, usual, key):
            kind = "a number" if isinstance(usual, float) else f"a value such as {usual!r}"
            hint = f"give {kind}, or leave the key out"
            issues.append(
                ConfigIssue("this is no value of the key", key=key, value=value, location=location, hint=hint)
            )
    ConfigError.raise_any(issues)
    return found


def _fits(value: Any, usual: Any, key: str) -> bool:
    if value is None:
        return usual is None or key in _MAY_BE_NULL
    if isinstance(usual, bool):
        return isinstance(value, (bool, int))
    if usual is None:
        return True
    if isinstance(usual, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(usual, int):
        is_number = isinstance(value, int) or (isinstance(value, float) and key in ROTARY)
        return is_number and not isinstance(value, bool) and value >= 0
    return isinstance(value, (str, int)) and not isinstance(value, bool)
