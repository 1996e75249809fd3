"""Facts that a parameter carries, written by the layer that makes it.

The optimizer's groups, the gradient norm, clipping and checkpoints read these marks; none of them looks at class or
parameter names. DeepSpeed reads two attributes of its own, which are set here and nowhere else.
"""

from __future__ import annotations

from torch import nn

from megatron.distributed.collectives import summed
from megatron.distributed.mesh import Axis, expert_group_name


def mark_sharded(parameter: nn.Parameter, dim: int, sections: tuple[int, ...] = ()) -> None:
    """Each tensor-parallel rank holds a different slice along ``dim`` (see megatron.param_table for ``sections``)."""
    parameter.neox_shard_dim = dim  # type: ignore[attr-defined]
    parameter.neox_shard_sections = sections  # type: ignore[attr-defined]
    # DeepSpeed's gradient norm counts a parameter on every tensor-parallel rank only where it finds one of these.
    parameter.model_parallel = True  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether tensor-parallel ranks hold different slices of the parameter; replicas are equal on all of them."""
    return shard_dim(parameter) is not None


def shard_dim(parameter: nn.Parameter) -> int | None:
    """The dimension along which the parameter is cut, or None for a replica."""
    return getattr(parameter, "neox_shard_dim", None)


def shard_sections(parameter: nn.Parameter) -> tuple[int, ...]:
    """Global sizes of the sections along the cut dimension that are sliced one by one; () for a single section."""
    return getattr(parameter, "neox_shard_sections", ())


def mark_no_weight_decay(parameter: nn.Parameter) -> None:
    """Weight decay leaves the parameter alone (norms and biases)."""
    parameter.neox_no_weight_decay = True  # type: ignore[attr-defined]


def no_weight_decay(parameter: nn.Parameter) -> bool:
    """Whether weight decay leaves the parameter alone."""
    return getattr(parameter, "neox_no_weight_decay", False)


def mark_tied(parameter: nn.Parameter) -> None:
    """The parameter is used by several layers; pipeline stages hold copies of it, and the first speaks for them."""
    parameter.neox_tied = True  # type: ignore[attr-defined]


def is_tied(parameter: nn.Parameter) -> bool:
    """Whether several pipeline stages may hold a copy of the parameter."""
    return getattr(parameter, "neox_tied", False)


def mark_embedding_like(parameter: nn.Parameter) -> None:
    """The matrix is a table with a row a token or a position, or the output layer: it maps no features to features."""
    parameter.neox_table = True  # type: ignore[attr-defined]


def is_table(parameter: nn.Parameter) -> bool:
    """Whether the rows of the matrix belong to tokens or positions."""
    return getattr(parameter, "neox_table", False)


def mark_partial_grad(parameter: nn.Parameter, axis: Axis) -> None:
    """Each rank of the axis uses the parameter on its part of the sequence or of the heads only, so its gradient is a
    part of a sum.

    The parts are summed inside autograd, before the gradient reaches the parameter: ZeRO partitions gradients as they
    arrive, and after that nobody could add them up.
    """
    parameter.register_hook(lambda gradient: summed(gradient, axis))


def mark_experts(parameter: nn.Parameter, axis: Axis) -> None:
    """The ranks of the axis each hold other experts, one after another along dimension 0.

    Where there is more than one such rank DeepSpeed must not average the gradient over all data-parallel ranks: it
    reads two attributes, and sums over the ranks that hold the same experts.
    """
    parameter.neox_experts = axis  # type: ignore[attr-defined]
    if axis.size > 1:
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = expert_group_name(axis.size)  # type: ignore[attr-defined]


def expert_axis(parameter: nn.Parameter) -> Axis | None:
    """The ranks that hold other experts of the same stack, or None for a parameter that is no stack of experts."""
    return getattr(parameter, "neox_experts", None)


def expert_rank_and_size(parameter: nn.Parameter) -> tuple[int, int]:
    """(rank, size) along the axis of experts; (0, 1) where the parameter is whole."""
    axis = expert_axis(parameter)
    return (axis.rank, axis.size) if axis is not None else (0, 1)
