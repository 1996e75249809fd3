"""Keys of parts of a model that have an effect only where the part is switched on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron.config.config import Config
from megatron.registry import ACTIVATIONS


@dataclass(frozen=True)
class DependentKeys:
    """Keys that share a condition."""

    keys: tuple[str, ...]
    """The keys."""
    condition: Callable[[Config], bool]
    """Whether they have an effect."""
    reason: str
    """The reason why they have none otherwise."""


OF_PARTS: tuple[DependentKeys, ...] = (
    DependentKeys(("gpt_j_tied",), lambda config: config.model.gpt_j_residual, "gpt_j_residual is off"),
    DependentKeys(
        ("qk_layernorm_across_heads",), lambda config: config.model.use_qk_layernorm, "use_qk_layernorm is off"
    ),
    DependentKeys(
        ("activation_func_clamp_value", "glu_linear_offset"),
        lambda config: ACTIVATIONS.entry(config.model.activation).gated,
        "the activation is not a gated one",
    ),
    DependentKeys(
        ("layer_type_options",), lambda config: config.model.layer_types is not None, "layer_types is left out"
    ),
    DependentKeys(
        ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
        lambda config: config.model.multi_latent_attention,
        "multi_latent_attention is off",
    ),
    DependentKeys(
        ("mtp_loss_scaling_factor",),
        lambda config: config.model.mtp_num_layers is not None,
        "no module predicts further tokens (mtp_num_layers)",
    ),
)
