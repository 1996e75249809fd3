"""Configuration sections with the values a small model needs, for tests that build models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from megatron.distributed.mesh import Topology
from megatron.model.layers import build_layer_specs
from megatron.model.loss_parts import LossParts
from megatron.model.model_spec import ModelSpec
from megatron.model.retro_model import RetroModel
from megatron.model.sequential_model import SequentialModel

VOCABULARY = 96


def model_section(**changes: object) -> Any:
    """A model section as the configuration resolves it: 2 layers of 64 features, 4 heads, rotary positions."""
    values: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_kv_heads": 4,
        "kv_channels": 16,
        "mlp_width": 176,
        "activation": "gelu",
        "norm": "layernorm",
        "layernorm_epsilon": 1e-5,
        "rms_norm_epsilon": 1e-6,
        "use_bias_in_norms": True,
        "use_bias_in_attn_linear": True,
        "use_bias_in_mlp": True,
        "pos_emb": "rotary",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "max_position_embeddings": 64,
        "no_weight_tying": True,
        "gpt_j_residual": False,
        "gpt_j_tied": False,
        "sliding_window_width": None,
        "sparsity_config": None,
        "use_qk_layernorm": False,
        "rpe_num_buckets": 8,
        "rpe_max_distance": 24,
        "opt_pos_emb_offset": 0,
        "rope_scaling": None,
        "scalenorm_epsilon": 1e-8,
        "seq_length": 64,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_mask": "causal",
        "lm_head": "linear",
        "bert_binary_head": False,
        "num_token_types": 0,
        "num_classes": None,
        "retrieval_shared_encoder": False,
        "retrieval_projection_size": None,
        "lora": None,
        "soft_prompt_tuning": None,
        "add_qkv_bias": None,
        "norm_placement": "pre",
        "embedding_norm": False,
        "qk_layernorm_across_heads": False,
        "layer_types": None,
        "layer_type_options": None,
        "softmax_scale": None,
        "softmax_type": "vanilla",
        "attention_output_gate": False,
        "value_residual": False,
        "activation_func_clamp_value": None,
        "glu_linear_offset": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "scale_embeddings": False,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logit_scale": 1.0,
        "encoder_num_layers": None,
        "encoder_seq_length": None,
        "decoder_seq_length": None,
        "retro_add_retriever": False,
        "retro_chunk_length": 64,
        "retro_num_neighbors": 2,
        "retro_num_retrieved_chunks": 2,
        "retro_encoder_layers": 2,
        "retro_encoder_hidden_dropout": 0.1,
        "retro_encoder_attention_dropout": 0.1,
        "retro_cross_attention_layers": None,
    }
    unknown = changes.keys() - values.keys() - {"attention_config"}
    assert not unknown, unknown
    values.update(changes)
    layers = values["num_layers"]
    assert isinstance(layers, int)
    return SimpleNamespace(**{"attention_config": ("global",) * layers, **values})


def initialization_section(**changes: object) -> Any:
    """The public defaults."""
    values = {"init_method": "normal", "output_layer_init_method": "scaled_normal", "init_method_std": 0.02}
    return SimpleNamespace(**{**values, **changes})


LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "rotary_pct": 1.0,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
}
"""What makes a section a Llama."""


def build(
    topology: Topology | None = None,
    *,
    seed: int = 1234,
    dtype: torch.dtype = torch.float32,
    std: float = 0.02,
    vocabulary: int = VOCABULARY,
    reset: bool = False,
    reset_attention: bool = False,
    reset_positions: bool = False,
    parts: LossParts | None = None,
    **changes: object,
) -> Any:
    """A SequentialModel on the CPU, or a RetroModel. reset: attention and positions at each document."""
    spec = ModelSpec(
        model_section(**changes),
        initialization_section(init_method_std=std),
        SimpleNamespace(),
        padded_vocab_size=vocabulary,
        topology=topology or Topology.single(),
        seed=seed,
        dtype=dtype,
        device=torch.device("cpu"),
        reset_attention=reset or reset_attention,
        reset_positions=reset or reset_positions,
        loss_parts=parts,
    )
    layers = build_layer_specs(spec)
    return SequentialModel(layers) if spec.dims.retro is None else RetroModel(layers, spec.dims.retro)


def disturb(model: torch.nn.Module, seed: int = 5) -> None:
    """Give every bias and norm a value of its own, which initialisation leaves at 0 or 1, so that none can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
