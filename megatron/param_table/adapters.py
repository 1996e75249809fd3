"""The tensors that are trained beside a frozen model: low-rank updates of matrices, and a learned prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron.adapter_config import LowRank
from megatron.param_table.tensor import TensorShape

DOWN, UP = "lora_A", "lora_B"
"""The two factors of an update, as modules beside the weight that they change."""
PROMPT = "soft_prompt.weight"
"""The learned prompt, in layer 0."""
ADDED = ("adapter", "prompt")
"""Kinds of tensors that are added to a model; where there are any, they alone are trained."""


def with_lora(table: Sequence[TensorShape], asked: LowRank | None) -> list[TensorShape]:
    """The tensors of a block, with the two factors behind each matrix that has an update.

    Of a matrix whose outputs are cut over ranks B is cut alike, of one whose inputs are cut A.
    """
    if asked is None:
        return list(table)
    made: list[TensorShape] = []
    for number, shape in enumerate(table):
        made.append(shape)
        module = shape.name.rpartition(".")[0]
        further = table[number + 1].name if number + 1 < len(table) else ""
        if module in asked.modules() and not further.startswith(f"{module}."):
            weight = next(one for one in table if one.name == f"{module}.weight")
            made += _factors(weight, module, asked.rank)
    return made


def _factors(weight: TensorShape, module: str, rank: int) -> tuple[TensorShape, TensorShape]:
    out, inp = weight.shape
    cut = weight.shard_dim
    down = TensorShape(weight.layer, f"{module}.{DOWN}.weight", (rank, inp), 1 if cut == 1 else None, "adapter")
    sections = weight.sections if cut == 0 else ()
    up = TensorShape(weight.layer, f"{module}.{UP}.weight", (out, rank), 0 if cut == 0 else None, "adapter", sections)
    return down, up


def prompt_tensor(length: int, hidden: int) -> TensorShape:
    """The learned prompt of so many vectors."""
    return TensorShape(0, PROMPT, (length, hidden), None, "prompt")


def is_added(shape: TensorShape) -> bool:
    """Whether a tensor belongs to what is trained beside a frozen model."""
    return shape.kind in ADDED


def trained(table: Iterable[TensorShape]) -> list[TensorShape]:
    """The tensors that training changes: those that were added, or all of a model without such."""
    listed = list(table)
    return [shape for shape in listed if is_added(shape)] or listed
