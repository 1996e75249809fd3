"""Gives the linear layers of a built model products in FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

from megatron.errors import ConfigError
from megatron.kernels.fp8 import fp8_linear
from megatron.model.block import Block
from megatron.registry.fp8 import FP8_RECIPES


def use_fp8(block: dict[str, Any] | None, model: Module, device: torch.device) -> None:
    """Replaces the products of attention and MLP in all blocks; the output layer, routers and experts stay.

    Raises ConfigError where the GPU has no such products.

    Args:
        block: The key `fp8`; None for no FP8.
        model: Built model.
        device: Its device.
    """
    if block is None:
        return
    recipe = FP8_RECIPES[block["recipe"]]
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < recipe.capability:
            need, have = (".".join(map(str, each)) for each in (recipe.capability, found))
            raise ConfigError.of(
                f"this recipe needs a GPU of compute capability {need}, and {torch.cuda.get_device_name(device)} "
                f"has {have}",
                key="fp8",
                value=block,
                hint="leave it out, or write recipe: tensorwise (from 8.9)",
            )
    kernel = fp8_linear(recipe)
    for each in model.modules():
        if isinstance(each, Block):
            for layer in each.linear_layers():
                layer.kernel = kernel
