"""What config.json of families with recurrent blocks means where it leaves a key out; see config_defaults.py.

Source: the configuration classes of transformers 5.23 and 4.57.6, which agree in all of this.
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
MIXER_DEFAULTS: Mapping[str, Settings] = {"mamba": _MAMBA, "mamba2": _MAMBA2}
"""model_type -> key -> the value of its class."""
