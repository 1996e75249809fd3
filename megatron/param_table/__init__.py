"""Table of a model's tensors: layer index, name, global shape and shard dimension."""

from megatron.param_table.adapters import (
    DOWN,
    EXPERT_FACTORS,
    EXPERT_STACKS,
    MAGNITUDE,
    NAMED_KINDS,
    PROMPT,
    UP,
    is_adapter_tensor,
    trainable_tensors,
)
from megatron.param_table.blocks import retrieval_tensors
from megatron.param_table.dims import LatentDims, MixtureDims, ModelDims
from megatron.param_table.mixer_dims import DeltaDims, MixerDims
from megatron.param_table.mixers import recurrent_state_shapes
from megatron.param_table.parts import FIRST_BLOCK, key_in_table
from megatron.param_table.retro_dims import RetroDims
from megatron.param_table.table import tensors
from megatron.param_table.tensor import TensorShape, section_slices
from megatron.param_table.widths import (
    Multipliers,
    MupWidths,
    WidthRatio,
    base_shapes,
    base_widths,
    learning_rates,
    width_ratios,
)

__all__ = [
    "DOWN",
    "EXPERT_FACTORS",
    "EXPERT_STACKS",
    "FIRST_BLOCK",
    "MAGNITUDE",
    "NAMED_KINDS",
    "PROMPT",
    "UP",
    "DeltaDims",
    "LatentDims",
    "MixerDims",
    "MixtureDims",
    "ModelDims",
    "Multipliers",
    "MupWidths",
    "RetroDims",
    "TensorShape",
    "WidthRatio",
    "base_shapes",
    "base_widths",
    "is_adapter_tensor",
    "key_in_table",
    "learning_rates",
    "recurrent_state_shapes",
    "retrieval_tensors",
    "section_slices",
    "tensors",
    "trainable_tensors",
    "width_ratios",
]
