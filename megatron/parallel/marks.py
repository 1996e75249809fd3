"""Facts that a parameter carries, written by the layer that makes it.

The optimizer's groups, the gradient norm, clipping and checkpoints read these marks; none of them looks at class or
parameter names. DeepSpeed reads two attributes of its own, which are set here and nowhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.parallel.collectives import all_reduce
from megatron.parallel.topology import Axis


def mark_sharded(parameter: nn.Parameter, dim: int, sections: tuple[int, ...] = ()) -> None:
    """Each tensor-parallel rank holds a different slice along ``dim`` (see megatron.shapes for ``sections``)."""
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
    """The parameter is used at both ends of the model; a pipeline holds a copy of it on its first and last stage."""
    parameter.neox_tied = True  # type: ignore[attr-defined]


def is_tied(parameter: nn.Parameter) -> bool:
    """Whether two pipeline stages may hold a copy of the parameter."""
    return getattr(parameter, "neox_tied", False)


def mark_sequence_partial(parameter: nn.Parameter, axis: Axis) -> None:
    """Each rank of the axis uses the parameter on its part of the sequence only, so its gradient is a part of a sum.

    The parts are summed inside autograd, before the gradient reaches the parameter: ZeRO partitions gradients as they
    arrive, and after that nobody could add them up.
    """

    def whole(gradient: Tensor) -> Tensor:
        return all_reduce(gradient.clone(memory_format=torch.contiguous_format), axis)

    parameter.neox_sequence_partial = True  # type: ignore[attr-defined]
    parameter.register_hook(whole)


def is_sequence_partial(parameter: nn.Parameter) -> bool:
    """Whether the ranks of a tensor-parallel group each contribute a part of the parameter's gradient."""
    return getattr(parameter, "neox_sequence_partial", False)
