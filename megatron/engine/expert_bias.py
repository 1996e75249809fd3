"""Correction biases of routers: those of a rank by their keys, and their update after a step.

A bias is a buffer of the model, so no optimizer has it; it is stored and loaded like a weight that every rank has.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn import Module

from megatron.model.moe.layer import CORRECTION_BIAS, MoELayer

_PREFIX = "sequential."


def correction_biases(model: Module) -> dict[str, Tensor]:
    """Returns key -> bias of the routers of a model, whose layers have their indices as names."""
    named = model.named_buffers()
    return {name.removeprefix(_PREFIX): buffer for name, buffer in named if name.endswith(f".{CORRECTION_BIAS}")}


def counting_layers(model: Module) -> list[MoELayer]:
    """Returns the layers with experts that count the assignments of a step."""
    return [module for module in model.modules() if isinstance(module, MoELayer) and module.step_counts is not None]


def update_biases(layers: Iterable[MoELayer], skipped: Tensor) -> None:
    """Updates the biases from the counts of the step, and begins the counts of the next. skipped: see update_bias."""
    for layer in layers:
        layer.update_bias(skipped)
