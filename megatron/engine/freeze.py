"""Training a part of a model: what stays as it is, and how a learned prompt starts."""

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
from megatron.param_table import PROMPT, TensorShape, trained

_WORDS, _PROMPT = "0.word_embeddings.weight", f"0.{PROMPT}"


def freeze(parameters: Mapping[str, Parameter], table: Sequence[TensorShape]) -> None:
    """Turns off the gradients of what training does not change. parameters: by "<layer>.<name>", as in the table."""
    changed = {f"{shape.layer}.{shape.name}" for shape in trained(table)}
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in changed)


def optimizer_parameters(model: Module, parameters: Iterable[Parameter]) -> list[Parameter]:
    """The parameters of this rank, and on a pipeline stage where all of them are frozen one that is not.

    Optimizers and DeepSpeed want at least one each. It takes no part in the model and never has a gradient.
    """
    held = list(parameters)
    if any(parameter.requires_grad for parameter in held):
        return held
    idle = Parameter(torch.zeros(1, dtype=held[0].dtype, device=held[0].device))
    model.register_parameter("idle", idle)  # DeepSpeed looks for its name in the model
    return [*held, idle]


def allow_empty_grad_norm(optimizer: Any) -> None:
    """Lets a rank take part in the gradient norm without a gradient that it counts: it adds 0.

    DeepSpeed's optimizer of bfloat16 stops at an empty list, where everything on a stage is frozen, or all that is
    trained is whole on every tensor-parallel rank and counted by the first.
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
    """Gives a learned prompt the vectors of some tokens, again and again up to its length.

    Nothing happens where there is no prompt, on the later stages of a pipeline. Collective over the tensor-parallel
    axis. parameters: before ZeRO cuts them.
    """
    prompt, words = parameters.get(_PROMPT), parameters.get(_WORDS)
    if prompt is None or words is None:
        return
    wanted = torch.tensor(list(islice(cycle(tokens), prompt.shape[0])), device=words.device)
    prompt.copy_(_rows(words, wanted, axis))


def _rows(words: Tensor, wanted: Tensor, axis: Axis) -> Tensor:
    """Rows of a table whose rows are cut over the ranks of the axis."""
    local = wanted - axis.rank * words.shape[0]
    elsewhere = (local < 0) | (local >= words.shape[0])
    rows = words[local.masked_fill(elsewhere, 0)].masked_fill(elsewhere.unsqueeze(-1), 0)
    return all_reduce(rows, axis)
