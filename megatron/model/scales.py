"""Factors and bounds that some models apply to embeddings, scores, what blocks add, and logits; none by default."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.model.positions.rope_frequencies import score_factor
from megatron.param_table import ModelDims


@dataclass(frozen=True)
class Scales:
    """Factors of activations beside those of muP, and bounds of logits."""

    words: float = 1.0
    """Of word embeddings, as the model's type has it."""
    embedding: float = 1.0
    """Of embeddings, a soft prompt's too."""
    query: float = 1.0
    """Of queries, whose scores the kernels divide by sqrt(d)."""
    residual: float = 1.0
    """Of what attention and MLP add to the residual."""
    logits: float = 1.0
    """Of the output layer's input."""
    attention_bound: float | None = None
    """Bound of attention scores."""
    logit_bound: float | None = None
    """Bound of logits."""

    @classmethod
    def of(cls, model: Any, dims: ModelDims, dtype: torch.dtype) -> Scales:
        """Reads an object with the keys of the model section. dtype: of the model."""
        root = (
            torch.tensor(math.sqrt(dims.hidden_size), dtype=dtype, device="cpu").item()
            if model.scale_embeddings
            else 1.0
        )
        return cls(
            words=root,
            embedding=model.embedding_multiplier,
            query=_query(model, dims),
            residual=model.residual_multiplier,
            logits=model.logit_scale,
            attention_bound=model.attn_logit_softcapping,
            logit_bound=model.final_logit_softcapping,
        )


def _query(model: Any, dims: ModelDims) -> float:
    """Returns the factor of queries: the given scale of scores, or that of latent attention in long contexts."""
    if model.softmax_scale is not None:
        return float(model.softmax_scale * math.sqrt(dims.head_dim))
    return 1.0 if dims.latent is None else score_factor(model.rope_scaling)


def scaled(x: Tensor, factor: float) -> Tensor:
    """Returns x times the factor, or x itself for a factor of 1."""
    return x if factor == 1.0 else x * factor
