"""Replaces parts of a block by NVIDIA's Transformer Engine. Parameters keep their modules and names.

Each function here makes one part of a built block use the package; the engine calls those that are requested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor

from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.kernels.transformer_engine import Attention, NormMLPWeights, linear_of, norm_mlp_of
from megatron.model.block import TransformerBlock
from megatron.registry import ACTIVATIONS

Layer = ColumnParallelLinear | RowParallelLinear
Recompute = Callable[..., Tensor] | None
"""recompute(attention core, *inputs) repeats the core in the backward pass; None if it is saved."""


def _name_of(activation: Callable[[Tensor], Tensor]) -> str:
    """Returns the package's name of an activation."""
    for entry in ACTIVATIONS:
        if entry.in_transformer_engine is not None and ACTIVATIONS.load(entry.name) is activation:
            return entry.in_transformer_engine
    raise ValueError(f"Transformer Engine has no activation like {activation}")


def _use_package_kernel(layers: Iterable[Layer], kind: type[Layer]) -> None:
    for layer in layers:
        if isinstance(layer, kind):
            alone = layer.axis.size == 1 or kind is ColumnParallelLinear
            layer.kernel = linear_of(
                layer.weight, layer.bias if alone else None
            )  # otherwise added after the sum over ranks


def columns(block: TransformerBlock, recompute: Recompute) -> None:
    """Replaces the products of column-parallel layers."""
    _use_package_kernel(block.linear_layers(), ColumnParallelLinear)


def rows(block: TransformerBlock, recompute: Recompute) -> None:
    """Replaces the products of row-parallel layers."""
    _use_package_kernel(block.linear_layers(), RowParallelLinear)


def attention(block: TransformerBlock, recompute: Recompute) -> None:
    """Replaces the attention core, and the products before and after it."""
    for layer in (block.attention.query_key_value, block.attention.dense):
        _use_package_kernel([layer], type(layer))
    core = Attention(block.attention.attend)
    block.attention.attend = core if recompute is None else partial(recompute, core)


def fused_norm_mlp(block: TransformerBlock, recompute: Recompute) -> None:
    """Replaces the norm before the MLP and the MLP by one layer."""
    norm: Any = block.post_attention_layernorm
    mlp = block.mlp
    weight = getattr(norm, "weight", None)
    weights = NormMLPWeights(
        norm=norm.scale if weight is None else weight,
        norm_bias=getattr(norm, "bias", None),
        first=mlp.linear1.weight,
        first_bias=mlp.linear1.bias,
        second=mlp.linear2.weight,
        second_bias=mlp.linear2.bias,
    )
    block.fused_norm_mlp = norm_mlp_of(
        weights,
        epsilon=norm.epsilon,
        activation=_name_of(mlp.activation),
        ranks=block.axis.size,
        group=block.axis.group,
        sequence_parallel=block.axis.sequence_parallel,
    )
