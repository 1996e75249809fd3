"""Exact numbers of parameters, from the one table of every tensor."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from megatron.config import Config
from megatron.shapes import ModelDims, TensorShape, tensors

SAME_TENSORS = {"global", "flash", "local", "sparse_fixed", "sparse_variable", "bigbird", "bslongformer"}
"""Kinds of attention that differ in which positions they see, not in their weights."""


def why_unknown(config: Config) -> str | None:
    """Why the table does not describe this model, or None where it does."""
    model = config.model
    kinds = sorted({str(kind) for kind in model.attention_config or ()} - SAME_TENSORS)
    reasons = [
        (bool(kinds), f"blocks of kind {', '.join(kinds)}"),
        (config.moe.moe_num_experts > 1, "mixture of experts"),
        (model.norm not in {"layernorm", "rmsnorm"}, f"norm {model.norm}"),
        (model.pos_emb == "rpe", "relative positions"),
        (model.use_qk_layernorm, "normalised queries and keys"),
        (bool(model.soft_prompt_tuning), "soft prompts"),
        (bool(model.lora), "low-rank updates"),
        (model.num_unique_layers is not None, "blocks that share weights"),
        (bool(model.opt_pos_emb_offset), "an offset of learned positions"),
    ]
    told = [reason for holds, reason in reasons if holds]
    return f"parameters are not counted yet for {' and '.join(told)}" if told else None


def model_tensors(config: Config, padded_vocab_size: int) -> list[TensorShape]:
    """Every tensor of the configured model."""
    return tensors(ModelDims.of(config.model), padded_vocab_size)


def total(table: Sequence[TensorShape]) -> int:
    """Parameters of the whole model."""
    return sum(tensor.count for tensor in table)


def on_rank(table: Sequence[TensorShape], layers: range, model_parallel_size: int, *, tied: bool, last: bool) -> int:
    """Parameters that one tensor parallel rank of the stage with these layers holds.

    tied: the output layer shares the word embedding, so a last stage without layer 0 holds a copy of it.
    """
    held = sum(prod(tensor.local_shape(model_parallel_size)) for tensor in table if tensor.layer in layers)
    if tied and last and 0 not in layers:
        word = next(tensor for tensor in table if tensor.kind == "word_embedding")
        held += prod(word.local_shape(model_parallel_size))
    return held
