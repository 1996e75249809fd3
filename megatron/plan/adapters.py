"""Saved activations of LoRA adapters, one block and micro batch [bytes]."""

from __future__ import annotations

from megatron.adapter_config import (
    CHANNEL_MIXING,
    GMLP,
    IN_PROJ,
    MODULES,
    OUT_PROJ,
    SHARED_IN,
    SHARED_OUT,
    TIME_MIXING,
)
from megatron.param_table import ModelDims
from megatron.param_table.blocks import block_tensors
from megatron.plan.activation_layout import ActivationLayout
from megatron.registry import GATED_DELTA_NET, GATED_MLPS, MLP_ALONE, WITH_OUT_PROJ, WITHOUT_MLP


def adapter_activations(dims: ModelDims, layout: ActivationLayout, block: int) -> int:
    """Returns the saved bytes of LoRA adapters: their products, and masks and outputs of dropout."""
    adapter = dims.low_rank
    if adapter is None:
        return 0
    hidden, tp = dims.hidden_size, layout.model_parallel_size
    if dims.kind(block) == GATED_DELTA_NET:
        widths = [("dense", dims.mixers.delta.value_size // tp), (IN_PROJ, hidden)]
    elif dims.kind(block) in WITH_OUT_PROJ:
        inner = dims.mixers.mamba2.inner if dims.kind(block) == "mamba2" else dims.mixers.mamba_inner
        widths = [(IN_PROJ, hidden), (OUT_PROJ, inner // tp)]
    elif dims.kind(block) == "rwkv":
        widths = [(TIME_MIXING, hidden)] * 4 + [(TIME_MIXING, dims.mixers.rwkv_attention // tp)]
        widths += [(CHANNEL_MIXING, hidden)] * 2 + [(CHANNEL_MIXING, dims.mixers.rwkv_ffn // tp)]
    elif dims.kind(block) in GATED_MLPS:
        widths = [(GMLP, hidden), (GMLP, dims.mixers.gmlp_width // tp)]
    elif dims.kind(block) == MLP_ALONE:
        widths = []
    else:
        widths = [("query_key_value", hidden), ("dense", dims.value_size // tp)]
        widths += [("output_gate", hidden)] if dims.output_gate else []
    if dims.kind(block) not in WITHOUT_MLP and not dims.has_experts(block):
        widths += [("dense_h_to_4h", hidden), ("dense_4h_to_h", dims.mlp_width // tp)]
    if dims.has_experts(block) and dims.mixture.shared_width:
        widths += [(SHARED_IN, hidden), (SHARED_OUT, dims.mixture.shared_width // tp)]
    inputs = [width for name, width in widths if name in adapter.targets]
    saved = len(inputs) * adapter.rank * layout.width
    if adapter.magnitudes:
        found = {name for name, _ in widths if name in adapter.targets}
        saved += sum(_outputs(dims, layout, block, name) for name in found) * layout.width
    if adapter.dropout > 0:
        saved += sum(inputs) * (layout.width if layout.cpu else 1)
        both = dims.shared_norm and {"query_key_value", "dense_h_to_4h"} <= set(adapter.targets)
        saved += hidden * layout.width if both else 0  # one output of a norm with two dropouts
    return layout.tokens * saved


def _outputs(dims: ModelDims, layout: ActivationLayout, block: int, target: str) -> int:
    """Returns the outputs of the targeted matrices on a rank, which DoRA saves for the gradients of their norms."""
    table = [one for one in block_tensors(dims, block) if MODULES.get(one.name.removesuffix(".weight")) == target]
    return sum(shape.local_shape(layout.model_parallel_size)[0] for shape in table)
