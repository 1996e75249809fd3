"""Applies the transformer_engine section to the blocks of a built model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Module

from megatron.config.schema.transformer_engine import TransformerEngineSection
from megatron.distributed.mesh import Topology
from megatron.model.block import TransformerBlock
from megatron.registry import TE_LAYERS


def use_transformer_engine(
    section: TransformerEngineSection, model: Module, topology: Topology, recompute: Callable[..., Tensor] | None
) -> None:
    """Replaces the parts that the section names by Transformer Engine's.

    Raises ConfigError if the package is requested and missing.

    Args:
        section: section of the configuration.
        model: built model.
        topology: layout of the ranks.
        recompute: recomputes attention cores; None to save them.
    """
    asked = [TE_LAYERS.load(name) for name in section.layers]
    if not asked:
        return
    region = _fp8_autocast(section, topology) if section.te_fp8_mha else None
    for block in model.modules():
        if not isinstance(block, TransformerBlock):
            continue
        for take in asked:
            take(block, recompute)
        block.zero3_gather_together = True  # the package reads parameters of other modules
        if region is not None:
            block.autocast = region


def _fp8_autocast(section: TransformerEngineSection, topology: Topology) -> Callable[[], Any]:
    from megatron.kernels.transformer_engine import fp8_autocast

    return fp8_autocast(
        hybrid=section.te_fp8_format == "hybrid",
        history=section.te_fp8_amax_history_len,
        algorithm=section.te_fp8_amax_compute_algo,
        margin=section.te_fp8_margin,
        group=topology.model.group if topology.model.size > 1 else None,
    )
