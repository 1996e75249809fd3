"""Tensors of LoRA adapters and soft prompts, and those of the model that are trained beside adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from megatron.adapter_config import EMBEDDING, EXPERTS_IN, EXPERTS_OUT, HEAD, LowRank
from megatron.param_table.tensor import TensorShape

DOWN, UP, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
"""The two matrices of a LoRA adapter and the trained norms of DoRA, as modules beside the weight."""
EXPERT_FACTORS = {
    "mlp.experts.mlp.w1": ("mlp.experts.mlp.lora_B1", "mlp.experts.mlp.lora_A1"),
    "mlp.experts.mlp.w3": ("mlp.experts.mlp.lora_B3", "mlp.experts.mlp.lora_A1"),
    "mlp.experts.mlp.w2": ("mlp.experts.mlp.lora_A2", "mlp.experts.mlp.lora_B2"),
}
"""Stack of experts -> the stacks whose product, expert by expert, times the scale is its update."""
PROMPT = "soft_prompt.weight"
"""The soft prompt, in layer 0."""
EXPERT_STACKS = "mlp.experts.mlp."
"""What the names of a block's experts begin with."""
ADDED = ("adapter", "expert_adapter", "prompt")
"""Kinds of tensors that are added to a frozen model."""
NAMED_KINDS = {"word_embedding": EMBEDDING, "head": HEAD}
"""Kinds of tensors that `modules_to_save` may name -> their names there."""


def with_lora(table: Sequence[TensorShape], adapter: LowRank | None) -> list[TensorShape]:
    """Returns the tensors of a block, with A, B and DoRA's norms of rows after each matrix that has a LoRA adapter, and
    A and B of experts at the end.

    B and the norms are sharded like a matrix with sharded outputs, A like one with sharded inputs.
    """
    if adapter is None:
        return list(table)
    tensors: list[TensorShape] = []
    for number, shape in enumerate(table):
        tensors.append(shape)
        module = shape.name.rpartition(".")[0]
        further = table[number + 1].name if number + 1 < len(table) else ""
        if module in adapter.modules() and not further.startswith(f"{module}."):
            weight = next(one for one in table if one.name == f"{module}.weight")
            tensors += _factors(weight, module, adapter)
    return tensors + _expert_factors(table, adapter)


def _expert_factors(table: Sequence[TensorShape], adapter: LowRank) -> list[TensorShape]:
    """A and B of every expert of a block: of w1 and w3, which share A, and of w2.

    They are stacked as the matrices are: A1, B1 and B3 [out, in] of each expert, A2 and B2 [in, out].
    """
    stacks = {shape.name.removeprefix(EXPERT_STACKS): shape for shape in table if shape.kind == "expert"}
    if not stacks or not adapter.of_experts:
        return []
    layer, sections, (rows, hidden) = stacks["w1"].layer, stacks["w1"].sections, stacks["w1"].shape
    inner, rank = len(sections) * adapter.rank, adapter.rank

    def replicated(name: str, inputs: int) -> TensorShape:
        parts = (rank,) * len(sections)
        return TensorShape(layer, f"{EXPERT_STACKS}{name}", (inner, hidden), None, "expert_adapter", parts, inputs)

    def sharded(name: str, inputs: int) -> TensorShape:
        return TensorShape(layer, f"{EXPERT_STACKS}{name}", (rows, rank), 0, "expert_adapter", sections, inputs)

    found = []
    if EXPERTS_IN in adapter.targets:
        found += [replicated(f"{DOWN}1", 1), sharded(f"{UP}1", 1), *([sharded(f"{UP}3", 1)] if "w3" in stacks else [])]
    if EXPERTS_OUT in adapter.targets:
        found += [sharded(f"{DOWN}2", 0), replicated(f"{UP}2", 0)]
    return found


def _factors(weight: TensorShape, module: str, adapter: LowRank) -> list[TensorShape]:
    out, inp = weight.shape
    cut, rank = weight.shard_dim, adapter.rank
    down = TensorShape(weight.layer, f"{module}.{DOWN}.weight", (rank, inp), 1 if cut == 1 else None, "adapter")
    sections = weight.sections if cut == 0 else ()
    rows = 0 if cut == 0 else None
    up = TensorShape(weight.layer, f"{module}.{UP}.weight", (out, rank), rows, "adapter", sections)
    if not adapter.magnitudes:
        return [down, up]
    return [down, up, TensorShape(weight.layer, f"{module}.{MAGNITUDE}.weight", (out,), rows, "adapter", sections)]


def prompt_tensor(length: int, hidden: int) -> TensorShape:
    """Returns the tensor of a soft prompt of `length` vectors."""
    return TensorShape(0, PROMPT, (length, hidden), None, "prompt")


def is_adapter_tensor(shape: TensorShape) -> bool:
    """Returns whether a tensor is of a LoRA adapter or a soft prompt."""
    return shape.kind in ADDED


def trainable_tensors(table: Iterable[TensorShape]) -> list[TensorShape]:
    """Returns the trainable tensors: adapters and what is trained beside them; all of a model without adapters."""
    listed = list(table)
    if not any(is_adapter_tensor(shape) for shape in listed):
        return listed
    return [shape for shape in listed if shape.trained or is_adapter_tensor(shape)]


def with_trained(table: Sequence[TensorShape], adapter: LowRank | None, *, tied: bool) -> list[TensorShape]:
    """Returns the tensors of a model, with those marked that `modules_to_save` names.

    Args:
        table: the tensors.
        adapter: the adapters; None without.
        tied: whether the output layer shares the word embedding's weight.
    """
    names = frozenset[str]() if adapter is None else adapter.trained(tied=tied)
    return [replace(shape, trained=True) if NAMED_KINDS.get(shape.kind) in names else shape for shape in table]
