"""Saved activations of LoRA adapters, one block and micro batch [bytes]."""

from __future__ import annotations

from megatron.adapter_config import MODULES
from megatron.param_table import ModelDims
from megatron.param_table.blocks import block_tensors
from megatron.plan.activation_layout import ActivationLayout


def adapter_activations(dims: ModelDims, layout: ActivationLayout, block: int) -> int:
    """Returns the saved bytes of LoRA adapters: their products, and masks and outputs of dropout.

    DoRA saves the outputs of the targeted matrices too, for the gradients of their norms. Experts save their own.
    """
    adapter = dims.low_rank
    if adapter is None:
        return 0
    matrices = [
        shape.local_shape(layout.model_parallel_size)
        for shape in block_tensors(dims, block)
        if shape.kind != "expert" and MODULES.get(shape.name.removesuffix(".weight")) in adapter.targets
    ]
    saved = len(matrices) * adapter.rank * layout.width
    if adapter.magnitudes:
        saved += sum(outputs for outputs, _ in matrices) * layout.width
    if adapter.dropout > 0:
        saved += sum(inputs for _, inputs in matrices) * (layout.width if layout.cpu else 1)
        both = dims.shared_norm and {"query_key_value", "dense_h_to_4h"} <= set(adapter.targets)
        saved += dims.hidden_size * layout.width if both else 0  # one output of a norm with two dropouts
    return layout.tokens * saved
