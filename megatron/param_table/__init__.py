"""The one table of a model's tensors: layer index, name, global shape and how tensor parallelism cuts it."""

from megatron.param_table.adapters import DOWN, PROMPT, UP, is_added, trained
from megatron.param_table.dims import MixerDims, MixtureDims, ModelDims
from megatron.param_table.mixers import remembered
from megatron.param_table.parts import FIRST_BLOCK, key_in_table
from megatron.param_table.table import tensors
from megatron.param_table.tensor import TensorShape, section_slices
from megatron.param_table.widths import (
    Multipliers,
    WidthRatio,
    Widths,
    base_shapes,
    base_widths,
    growths,
    learning_rates,
)

__all__ = [
    "DOWN",
    "FIRST_BLOCK",
    "PROMPT",
    "UP",
    "MixerDims",
    "MixtureDims",
    "ModelDims",
    "Multipliers",
    "TensorShape",
    "WidthRatio",
    "Widths",
    "base_shapes",
    "base_widths",
    "growths",
    "is_added",
    "key_in_table",
    "learning_rates",
    "remembered",
    "section_slices",
    "tensors",
    "trained",
]
