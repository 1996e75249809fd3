"""Stores the frozen matrices of blocks in few bits, for adapters that are trained beside them (QLoRA)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from megatron.adapter_config import is_in_frozen_format, low_rank
from megatron.distributed.mesh import Axis
from megatron.distributed.param_attrs import expert_axis
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.engine.expert_gather import gather_stack
from megatron.errors import ConfigError
from megatron.kernels.frozen_linear import FrozenLinear, FrozenMatrix
from megatron.kernels.linear import linear_ops
from megatron.model.moe.experts import ExpertStack
from megatron.registry import FROZEN_BLOCK, FROZEN_FORMATS

Store = Callable[[Tensor], FrozenMatrix]
LINEAR = (ColumnParallelLinear, RowParallelLinear)


@dataclass(frozen=True)
class FrozenWeight:
    """A weight that is no parameter any more."""

    matrix: FrozenMatrix
    """This rank's shard in few bits."""
    experts: Axis | None
    """Ranks that hold other experts of the same stack; None for other weights."""


def frozen_format(block: dict[str, Any] | None) -> Store | None:
    """Returns what stores a frozen weight; None unless `lora` has a `base`.

    Raises ConfigError where its package is missing. block: the key `lora`.
    """
    adapter = low_rank(block)
    return None if adapter is None or adapter.base is None else FROZEN_FORMATS.load(adapter.base)


def freeze_base(store: Store | None, model: Module, parameters: dict[str, Parameter]) -> dict[str, FrozenWeight]:
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
    found: dict[str, FrozenWeight] = {}
    for layer in model.modules():
        for name, weight in list(layer.named_parameters(recurse=False)):
            key = keys.get(id(weight), "")
            if not isinstance(layer, (*LINEAR, ExpertStack)) or not is_in_frozen_format(key.partition(".")[2]):
                continue
            _require_blocks(key, weight)
            found[key] = FrozenWeight(store(weight), expert_axis(weight))
            _replace(layer, name, found[key].matrix)
            del parameters[key]
    return found


def _replace(layer: Module, name: str, matrix: FrozenMatrix) -> None:
    """Takes the parameter of a layer away, and lets its product read the matrix."""
    delattr(layer, name)
    if isinstance(layer, LINEAR):
        layer.kernel, layer.weight = FrozenLinear(matrix, linear_ops(layer.kernel)), None  # type: ignore[assignment]
    else:
        setattr(layer, name, matrix)


def _require_blocks(key: str, weight: Tensor) -> None:
    if weight.shape[1] % FROZEN_BLOCK:
        raise ConfigError.of(
            f"base needs rows that divide by {FROZEN_BLOCK}, and those of {key} have {weight.shape[1]} on a rank",
            key="lora",
            hint="use fewer tensor-parallel ranks, or leave base out",
        )


def expanded(stored: Mapping[str, FrozenWeight], *, is_saved: bool) -> dict[str, Tensor]:
    """Returns the weights with the experts of all ranks; collective where these are distributed.

    They are in the host's memory, since they need not fit beside those of the device.

    Args:
        stored: by key.
        is_saved: true if this rank saves them; others get nothing.
    """
    found: dict[str, Tensor] = {}
    for key, weight in stored.items():
        spread = weight.experts is not None and weight.experts.size > 1
        if is_saved or spread:
            full = gather_stack(weight.matrix.expanded(), weight.experts)
            found |= {key: full.to("cpu")} if is_saved else {}
    return found
