"""Exact numbers of parameters, from the one table of every tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from megatron.block_sparsity import SPARSE_KINDS
from megatron.config import Config
from megatron.param_table import ModelDims, TensorShape, tensors
from megatron.registry import WITHOUT_ATTENTION

SAME_TENSORS = {"global", "flash", *SPARSE_KINDS}
"""Kinds of attention that differ in which positions they see, not in their weights."""


def why_unknown(config: Config) -> str | None:
    """Why the table does not describe this model, or None where it does."""
    model = config.model
    kinds = sorted({str(kind) for kind in model.attention_config or ()} - SAME_TENSORS - WITHOUT_ATTENTION)
    return f"parameters are not counted yet for blocks of kind {', '.join(kinds)}" if kinds else None


def model_tensors(config: Config, padded_vocab_size: int) -> list[TensorShape]:
    """Every tensor of the configured model."""
    return tensors(ModelDims.of(config.model, config.moe, config.mixers), padded_vocab_size)


def total(table: Sequence[TensorShape]) -> int:
    """Parameters of the whole model."""
    return sum(tensor.count for tensor in table)


def on_rank(table: Sequence[TensorShape], bounds: Sequence[int], model_parallel_size: int, *, tied: bool) -> list[int]:
    """Parameters that one tensor parallel rank of each stage holds, all experts of a block among them.

    bounds: first layers of the stages, and the end.

    tied: the output layer shares the word embedding, so a last stage without layer 0 holds a copy of it.
    """
    layers = [0] * bounds[-1]
    for tensor in table:
        layers[tensor.layer] += prod(tensor.local_shape(model_parallel_size))
    held = [sum(layers[first:end]) for first, end in pairwise(bounds)]
    if tied and bounds[-2] > 0:
        word = next(tensor for tensor in table if tensor.kind == "word_embedding")
        held[-1] += prod(word.local_shape(model_parallel_size))
    return held


def split_experts(table: Sequence[TensorShape]) -> tuple[list[TensorShape], list[TensorShape]]:
    """The tensors that every data parallel rank holds, and those of experts, which may be spread over such ranks."""
    experts = [tensor for tensor in table if tensor.kind == "expert"]
    return [tensor for tensor in table if tensor.kind != "expert"], experts
