"""Attributes of parameters, set by the layer that creates them.

Parameter groups, the gradient norm, clipping and checkpoints read these attributes instead of class or parameter names.
Two of them are attributes of DeepSpeed; they are set here only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.distributed.mesh import Axis, expert_group_name


def mark_sharded(parameter: nn.Parameter, dim: int, sections: tuple[int, ...] = ()) -> None:
    """Marks a parameter of which each tensor-parallel rank holds a shard along ``dim``.

    sections: as in megatron.param_table.
    """
    parameter.neox_shard_dim = dim  # type: ignore[attr-defined]
    mark_sections(parameter, sections)
    # DeepSpeed's gradient norm counts a parameter on every tensor-parallel rank only if it has one of these.
    parameter.model_parallel = True  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def mark_sections(parameter: nn.Parameter, sections: tuple[int, ...]) -> None:
    """Marks the global sizes of the sections along the first dimension of a stack, or along a shard dimension."""
    parameter.neox_shard_sections = sections  # type: ignore[attr-defined]


def is_sharded(parameter: nn.Parameter) -> bool:
    """Returns whether tensor-parallel ranks hold different shards of the parameter; otherwise it is replicated."""
    return shard_dim(parameter) is not None


def shard_dim(parameter: nn.Parameter) -> int | None:
    """Returns the dimension along which the parameter is sharded, or None if it is replicated."""
    return getattr(parameter, "neox_shard_dim", None)


def shard_sections(parameter: nn.Parameter) -> tuple[int, ...]:
    """Returns the global sizes of the sections that are sharded separately; () for a single section."""
    return getattr(parameter, "neox_shard_sections", ())


def mark_no_weight_decay(parameter: nn.Parameter) -> None:
    """Excludes the parameter from weight decay (norms and biases)."""
    parameter.neox_no_weight_decay = True  # type: ignore[attr-defined]


def no_weight_decay(parameter: nn.Parameter) -> bool:
    """Returns whether the parameter is excluded from weight decay."""
    return getattr(parameter, "neox_no_weight_decay", False)


def mark_tied(parameter: nn.Parameter) -> None:
    """Marks a parameter that several layers use; only the first pipeline stage's copy is counted and saved."""
    parameter.neox_tied = True  # type: ignore[attr-defined]


def is_tied(parameter: nn.Parameter) -> bool:
    """Returns whether several pipeline stages may hold a copy of the parameter."""
    return getattr(parameter, "neox_tied", False)


def mark_embedding_like(parameter: nn.Parameter) -> None:
    """Marks an embedding (a row a token or a position) or the output layer: no matrix from features to features."""
    parameter.neox_table = True  # type: ignore[attr-defined]


def is_embedding_like(parameter: nn.Parameter) -> bool:
    """Returns whether the rows of the matrix belong to tokens or positions."""
    return getattr(parameter, "neox_table", False)


def mark_experts(parameter: nn.Parameter, axis: Axis) -> None:
    """Marks a stack of experts along dimension 0, of which each rank of the axis holds a different part.

    On more than one rank DeepSpeed must not average the gradient over all data-parallel ranks: it reads two attributes,
    and sums over the ranks that hold the same experts.
    """
    parameter.neox_experts = axis  # type: ignore[attr-defined]
    if axis.size > 1:
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = expert_group_name(axis.size)  # type: ignore[attr-defined]


def expert_axis(parameter: Tensor) -> Axis | None:
    """Returns the ranks that hold other experts of the same stack, or None if the parameter is no stack of experts."""
    return getattr(parameter, "neox_experts", None)


def expert_rank_and_size(parameter: Tensor) -> tuple[int, int]:
    """Returns (rank, size) along the expert axis; (0, 1) if the parameter is not expert-parallel."""
    axis = expert_axis(parameter)
    return (axis.rank, axis.size) if axis is not None else (0, 1)


def expert_count(parameter: nn.Parameter) -> int:
    """Returns how many experts are stacked in the parameter on this rank; 1 if it is no stack."""
    size = expert_rank_and_size(parameter)[1]
    return len(shard_sections(parameter)) // size if expert_axis(parameter) is not None else 1


@dataclass(frozen=True)
class HeadLayout:
    """The rows of a joint weight of queries, keys and values, as the full tensor has them."""

    queries: int
    """Number of query heads."""
    keys: int
    """Number of key heads, and of value heads."""
    head_dim: int
    """Rows of a head."""
    grouped: bool
    """True if all queries are followed by all keys and all values; otherwise q, k and v alternate head by head."""


def mark_heads(parameter: nn.Parameter, layout: HeadLayout) -> None:
    """Marks the joint weight of queries, keys and values."""
    parameter.neox_heads = layout  # type: ignore[attr-defined]


def head_layout(parameter: nn.Parameter) -> HeadLayout | None:
    """Returns the order of the rows of the joint weight of queries, keys and values; None for any other parameter."""
    return getattr(parameter, "neox_heads", None)


def record_logits(parameter: nn.Parameter, heads: int) -> Tensor:
    """Has attention record the largest logit of each head since the tensor was last zeroed, 0 at least; returns it.

    Args:
        parameter: Joint weight of queries, keys and values.
        heads: Number of query heads on this rank.
    """
    recorded = parameter.new_zeros(heads, dtype=torch.float32).detach()
    parameter.neox_logits = recorded  # type: ignore[attr-defined]
    return recorded


def recorded_logits(parameter: nn.Parameter) -> Tensor | None:
    """Returns the tensor that the largest logits are recorded in; None where they are not."""
    return getattr(parameter, "neox_logits", None)


def copy_structure(source: nn.Parameter, target: nn.Parameter) -> None:
    """Marks a full tensor with the matrices that its shard consists of: heads, and the experts of a stack."""
    for name in ("neox_experts", "neox_shard_sections", "neox_heads"):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
