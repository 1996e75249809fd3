"""What config.json of families with recurrent blocks means where it leaves a key out; see config_defaults.py.

Source: the configuration classes of transformers 5.23 and 4.57.6, which agree in all of this; 4.57.6 has no
Nemotron-H.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron.checkpoint.huggingface.family import Settings

_MAMBA: Settings = {
    "vocab_size": 50280,
    "hidden_size": 768,
    "state_size": 16,
    "num_hidden_layers": 32,
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "time_step_rank": "auto",
    "tie_word_embeddings": True,
}
_MAMBA2: Settings = {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "num_heads": 128,
    "head_dim": 64,
    "state_size": 128,
    "n_groups": 8,
    "num_hidden_layers": 64,
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "time_step_limit": None,  # from 0 to infinity
    "tie_word_embeddings": False,
}
_NEMOTRON_H: Settings = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "layers_block_type": None,  # Mamba-2, experts, attention, MLP, or hybrid_override_pattern
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "intermediate_size": 21504,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "hidden_dropout": 0.0,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "n_groups": 8,
    "conv_kernel": 4,
    "expand": 2,  # not in use there
    "time_step_min": 0.001,
    "time_step_limit": None,  # from 0 to infinity, and not in use
    "use_conv_bias": True,
    "use_bias": False,
    "mamba_proj_bias": False,
    "layer_norm_epsilon": 1e-5,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "moe_latent_size": None,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
MIXER_DEFAULTS: Mapping[str, Settings] = {"mamba": _MAMBA, "mamba2": _MAMBA2, "nemotron_h": _NEMOTRON_H}
"""model_type -> key -> the value of its class."""
