"""What a model computes and saves in a forward pass, to hold the plan against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear


def measure(model: nn.Module, run: Callable[[], object], rows: int) -> tuple[int, int]:
    """The products of all linear layers but the output layer, and the bytes that autograd saves beside parameters.

    model: on the CPU. run: the pass. rows: of the output layer, whose matrix is left out.
    """
    products: list[int] = []

    def count(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        products.append(module.weight.numel() * inputs[0].shape[0] * inputs[0].shape[1])

    def is_product(module: nn.Module) -> bool:
        return isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.weight.shape[0] != rows

    for module in filter(is_product, model.modules()):
        module.register_forward_hook(count)
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    for each in model.parameters():
        held.pop(each.untyped_storage().data_ptr(), None)
    return sum(products), sum(each.untyped_storage().nbytes() for each in held.values())
