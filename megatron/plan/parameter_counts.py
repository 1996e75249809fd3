"""Exact parameter counts, from the table of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from megatron.adapter_config import is_in_frozen_format
from megatron.block_sparsity import SPARSE_KINDS
from megatron.config import Config
from megatron.param_table import ModelDims, TensorShape, tensors
from megatron.registry import ATTENTION_ALONE, FROZEN_BLOCK, FROZEN_FORMATS, WITHOUT_ATTENTION

SAME_TENSORS = {"global", "flash", ATTENTION_ALONE, *SPARSE_KINDS}
"""Kinds with the same tensors of attention and different masks."""
OF_EXPERTS = ("expert", "expert_bias", "expert_adapter")
"""Kinds of tensors that expert-parallel ranks share out."""


def unsupported_reason(config: Config) -> str | None:
    """Returns the reason why the table does not support this model, or None."""
    model = config.model
    kinds = sorted({str(kind) for kind in model.attention_config or ()} - SAME_TENSORS - WITHOUT_ATTENTION)
    return f"parameters are not counted yet for blocks of kind {', '.join(kinds)}" if kinds else None


def model_tensors(config: Config, padded_vocab_size: int) -> list[TensorShape]:
    """Returns every parameter of the configured model; buffers are none."""
    table = tensors(ModelDims.of(config.model, config.moe, config.mixers), padded_vocab_size)
    return [tensor for tensor in table if tensor.kind != "buffer"]


def total(table: Sequence[TensorShape]) -> int:
    """Returns the number of parameters."""
    return sum(tensor.count for tensor in table)


def on_rank(table: Sequence[TensorShape], bounds: Sequence[int], model_parallel_size: int, *, tied: bool) -> list[int]:
    """Returns the parameters of one tensor parallel rank of each stage, with all experts of a block.

    Args:
        table: tensors.
        bounds: first layers of the stages, and the end.
        model_parallel_size: tensor parallel degree.
        tied: whether the output layer shares the word embedding, so that the last stage has a copy of it.
    """
    layers = [0] * bounds[-1]
    for tensor in table:
        layers[min(tensor.layer, len(layers) - 1)] += prod(tensor.local_shape(model_parallel_size))
    held = [sum(layers[first:end]) for first, end in pairwise(bounds)]
    if tied and bounds[-2] > 0:
        word = next(tensor for tensor in table if tensor.kind == "word_embedding")
        held[-1] += prod(word.local_shape(model_parallel_size))
    return held


def split_experts(table: Sequence[TensorShape]) -> tuple[list[TensorShape], list[TensorShape]]:
    """Splits the tensors into those of every data parallel rank, and those of experts."""
    experts = [tensor for tensor in table if tensor.kind in OF_EXPERTS]
    return [tensor for tensor in table if tensor.kind not in OF_EXPERTS], experts


def frozen_tensors(dims: ModelDims, table: Sequence[TensorShape]) -> list[TensorShape]:
    """Returns the tensors that are stored in the format of a frozen base; none without one."""
    if dims.low_rank is None or dims.low_rank.base is None:
        return []
    return [tensor for tensor in table if is_in_frozen_format(tensor.name)]


def frozen_bytes(dims: ModelDims, count: int) -> int:
    """Returns the bytes of that many values in the format of a frozen base, with their scales."""
    if dims.low_rank is None or dims.low_rank.base is None:
        return 0
    return int(count * (FROZEN_FORMATS.entry(dims.low_rank.base).bits / 8 + 4 / FROZEN_BLOCK))
