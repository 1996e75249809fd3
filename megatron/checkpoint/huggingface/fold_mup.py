"""Weights of a muP model as those of the plain model that computes the same: its factors multiplied into them.

The output layer's and the router's factors go into their matrices, the embedding's into its tables, that of queries
into the rows that make them, or into the norm that they pass. Where the output layer is the word embedding, the final
norm takes what the two factors leave over.
"""

from __future__ import annotations

from torch import Tensor

from megatron.config.schema.model import ModelSection
from megatron.config.schema.mup import MupSection
from megatron.errors import ConfigIssue
from megatron.param_table import ModelDims, Multipliers, TensorShape
from megatron.registry import POSITIONS


def fold(shape: TensorShape, full: Tensor, dims: ModelDims, factors: Multipliers) -> Tensor:
    """A global tensor multiplied by its muP factor, in fp32 at least where it has one.

    Args:
        shape: Entry of the parameter table.
        full: The global tensor.
        dims: Sizes of the model.
        factors: Factors of muP.
    """
    factor, queries = _factor(shape, dims, factors), shape.name.startswith("attention.query_key_value.")
    if queries and not dims.qk_norm and factors.query != 1.0:
        return _with_queries(full.float(), dims, factors.query)
    return full if factor == 1.0 else full.float() * factor


def fold_misfits(mup: MupSection, model: ModelSection) -> list[ConfigIssue]:
    """What no weight can hold."""
    positions = POSITIONS.entry(model.pos_emb)
    if mup.use_mup and mup.mup_attn_temp != 1.0 and "scores" in positions.enters and not positions.scores:
        what = f"transformers gives what {model.pos_emb} adds to scores no temperature"
        return [ConfigIssue(what, key="mup_attn_temp", value=mup.mup_attn_temp)]
    return []


def _factor(shape: TensorShape, dims: ModelDims, factors: Multipliers) -> float:
    if shape.kind in ("word_embedding", "position_embedding"):
        return factors.embedding
    if shape.kind == "head":
        return factors.output
    if shape.kind == "norm" and shape.layer == dims.num_layers + 3 and dims.tied:
        return factors.output / factors.embedding
    if shape.name.startswith("attention.q_layernorm."):
        return factors.query
    return factors.router if shape.name == "mlp.router.layer.weight" else 1.0


def _with_queries(rows: Tensor, dims: ModelDims, factor: float) -> Tensor:
    """The joint projection [(n + 2m) d, ...] with the rows that make queries multiplied."""
    made = rows.clone()
    if dims.grouped:
        made[: dims.query_size] *= factor
    else:
        made.unflatten(0, (dims.num_attention_heads, 3, dims.head_dim))[:, 0] *= factor
    return made
