"""Freezes parameters, and initializes soft prompts and the norms of DoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron.distributed.collectives import all_reduce
from megatron.distributed.mesh import Axis
from megatron.distributed.process_group import device
from megatron.distributed.tensor_parallel.lora import magnitude_arguments
from megatron.param_table import PROMPT, TensorShape, trainable_tensors

_WORDS, _PROMPT = "0.word_embeddings.weight", f"0.{PROMPT}"


def freeze(parameters: Mapping[str, Parameter], table: Sequence[TensorShape]) -> None:
    """Disables the gradients of parameters that are not trained. parameters: by "<layer>.<name>", as in the table."""
    changed = {f"{shape.layer}.{shape.name}" for shape in trainable_tensors(table)}
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in changed)


def optimizer_parameters(model: Module, parameters: Iterable[Parameter]) -> list[Parameter]:
    """Returns the parameters of this rank; on a fully frozen pipeline stage also a trainable dummy.

    Optimizers and DeepSpeed need at least one parameter each. The dummy is not used by the model and never has a
    gradient.
    """
    held = list(parameters)
    if any(parameter.requires_grad for parameter in held):
        return held
    idle = Parameter(torch.zeros(1, dtype=held[0].dtype, device=held[0].device))
    model.register_parameter("idle", idle)  # DeepSpeed looks up its name in the model
    return [*held, idle]


def allow_empty_grad_norm(optimizer: Any) -> None:
    """Contributes 0 to the gradient norm on ranks without a gradient that they count.

    DeepSpeed's bfloat16 optimizer fails on an empty list, which occurs if a stage is frozen, or if all trainable
    parameters are replicated and counted by the first tensor-parallel rank.
    """
    counted = getattr(optimizer, "get_grads_for_norm", None)
    if counted is None:
        return

    def with_zero(for_clipping: bool = False) -> Any:
        found = counted(for_clipping)
        if for_clipping:
            return found
        own, experts = found
        return own or [torch.zeros(1, device=device())], experts

    optimizer.get_grads_for_norm = with_zero


@torch.no_grad()
def start_prompt(parameters: Mapping[str, Parameter], tokens: Sequence[int], axis: Axis) -> None:
    """Initializes a soft prompt with the vectors of some tokens, repeated up to its length.

    Does nothing on pipeline stages without the prompt. Collective over the tensor-parallel axis. parameters: before
    ZeRO partitions them.
    """
    prompt, words = parameters.get(_PROMPT), parameters.get(_WORDS)
    if prompt is None or words is None:
        return
    row_ids = torch.tensor(list(islice(cycle(tokens), prompt.shape[0])), device=words.device)
    prompt.copy_(_rows(words, row_ids, axis))


def start_magnitudes(model: Module, loaded: frozenset[int] | set[int]) -> None:
    """Sets norms of rows that no checkpoint had to those of the weights. Collective over the tensor-parallel axis.

    Args:
        model: with its weights loaded, before ZeRO partitions them.
        loaded: ids of the parameters that were loaded.
    """
    for module in model.modules():
        found = magnitude_arguments(module)
        if found is not None and id(found[0].weight) not in loaded:
            found[0].start(*found[1])


def _rows(words: Tensor, row_ids: Tensor, axis: Axis) -> Tensor:
    """Returns rows of an embedding whose rows are sharded over the axis."""
    local = row_ids - axis.rank * words.shape[0]
    elsewhere = (local < 0) | (local >= words.shape[0])
    rows = words[local.masked_fill(elsewhere, 0)].masked_fill(elsewhere.unsqueeze(-1), 0)
    return all_reduce(rows, axis)
