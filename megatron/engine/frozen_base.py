"""Stores the frozen matrices of blocks in few bits, for adapters that are trained beside them (QLoRA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from megatron.adapter_config import is_in_frozen_format, low_rank
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.errors import ConfigError
from megatron.kernels.frozen_linear import FrozenLinear, FrozenMatrix
from megatron.kernels.linear import linear_ops
from megatron.registry import FROZEN_BLOCK, FROZEN_FORMATS

Store = Callable[[Tensor], FrozenMatrix]


def frozen_format(block: dict[str, Any] | None) -> Store | None:
    """Returns what stores a frozen weight; None unless `lora` has a `base`.

    Raises ConfigError where its package is missing. block: the key `lora`.
    """
    adapter = low_rank(block)
    return None if adapter is None or adapter.base is None else FROZEN_FORMATS.load(adapter.base)


def freeze_base(store: Store | None, model: Module, parameters: dict[str, Parameter]) -> dict[str, FrozenMatrix]:
    """Replaces the weights that `is_in_frozen_format` names, and returns them by their keys; none without a format.

    They are no parameters any more, so DeepSpeed neither copies nor shards them.

    Args:
        store: what `frozen_format` returns.
        model: built model with its weights loaded.
        parameters: key -> parameter, "<layer>.<name>"; those that are replaced are taken out.
    """
    if store is None:
        return {}
    keys = {id(parameter): key for key, parameter in parameters.items()}
    found: dict[str, FrozenMatrix] = {}
    for layer in model.modules():
        if not isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
            continue
        key = keys.get(id(layer.weight), "")
        if is_in_frozen_format(key.partition(".")[2]):
            _require_blocks(key, layer.weight)
            found[key] = store(layer.weight)
            layer.kernel = FrozenLinear(found[key], linear_ops(layer.kernel))
            layer.weight = None  # type: ignore[assignment]
            del parameters[key]
    return found


def _require_blocks(key: str, weight: Tensor) -> None:
    if weight.shape[1] % FROZEN_BLOCK:
        raise ConfigError.of(
            f"base needs rows that divide by {FROZEN_BLOCK}, and those of {key} have {weight.shape[1]} on a rank",
            key="lora",
            hint="use fewer tensor-parallel ranks, or leave base out",
        )


def expanded(stored: dict[str, FrozenMatrix]) -> dict[str, Tensor]:
    """Returns the weights, in the host's memory, which need not fit beside those of the device."""
    return {key: matrix.expanded().to("cpu") for key, matrix in stored.items()}
