"""Gradients that are terms of a sum over tensor-parallel ranks, and when they are summed.

With sequence parallelism each rank applies norms and some biases to its shard of the sequence, so its gradient of them
is one term of a sum. ZeRO 1 to 3 partition gradients as they arrive, so there the terms are summed inside autograd, one
exchange a tensor and micro batch. Where a rank has all its gradients at the end of a step (ZeRO 0, and ZeRO 1 in
bfloat16), they are summed then, in one exchange, as in Megatron-LM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.distributed.collectives import all_reduce, all_reduced
from megatron.distributed.mesh import Axis


def mark_partial_grad(parameter: Parameter, axis: Axis) -> None:
    """Marks a parameter that each rank of the axis applies to its shard of the sequence or of the heads.

    The gradient is summed inside autograd, before it reaches the parameter, until `sum_at_step` changes that.
    """
    hook = parameter.register_hook(lambda gradient: all_reduced(gradient, axis))
    parameter.neox_partial_grad = (axis, hook)  # type: ignore[attr-defined]


def sum_at_step(parameters: Iterable[Parameter]) -> list[tuple[Parameter, Axis]]:
    """Ends the sums inside autograd. Returns the marked parameters, whose gradients the caller sums before a step."""
    found = []
    for parameter in parameters:
        mark = getattr(parameter, "neox_partial_grad", None)
        if mark is not None:
            axis, hook = mark
            hook.remove()
            found.append((parameter, axis))
    return found


def sum_together(gradients: Sequence[tuple[Tensor, Axis]]) -> None:
    """Sums gradients in place over the ranks of their axis, those of one axis and type in one exchange."""
    groups: dict[tuple[int, torch.dtype], list[tuple[Tensor, Axis]]] = {}
    for gradient, axis in gradients:
        groups.setdefault((id(axis), gradient.dtype), []).append((gradient, axis))
    for members in groups.values():
        tensors = [gradient for gradient, _ in members]
        flat = all_reduce(torch.cat([tensor.flatten() for tensor in tensors]), members[0][1])
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(one) for part, one in zip(parts, tensors, strict=True)])
