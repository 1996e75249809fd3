"""Width ratios of a model's tensors, and the factors of muP (arXiv:2203.03466).

Maximal update parametrisation compares a model with a base model that differs from it in widths alone. A dimension that
grows with them is called infinite, any other (vocabulary, positions, experts) finite. A tensor with two infinite
dimensions is a matrix of features by features, one with a single one is like a vector: a bias, a norm, an embedding, an
output layer. Table 8 of the paper, which the authors' package `mup` follows as well, has the factors of each.

Ratios are of the model over its base, so a model that is its own base has 1 everywhere. Everything follows from global
shapes, before tensor parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron.param_table.dims import ModelDims
from megatron.param_table.table import tensors

BaseShape = tuple[int | None, ...]
"""A size of the base model for every infinite dimension, None for a finite one."""


@dataclass(frozen=True)
class MupWidths:
    """Widths of a model that muP scales."""

    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Width of a head."""
    mlp_width: int
    """Inner width of the MLP."""

    @classmethod
    def of(cls, dims: ModelDims) -> MupWidths:
        """Returns the widths of a model."""
        return cls(**{name: getattr(dims, name) for name in cls.__annotations__})

    def on(self, dims: ModelDims) -> ModelDims:
        """Returns the same model with these widths."""
        return replace(dims, **asdict(self))

    def times(self, factor: int) -> MupWidths:
        """Returns all widths times a factor."""
        return MupWidths(**{name: value * factor for name, value in asdict(self).items()})


@dataclass(frozen=True)
class WidthRatio:
    """Sizes of a tensor over those of the base model."""

    ratios: tuple[float | None, ...]
    """Ratio along each dimension; None where it is finite."""
    inputs: int = -1
    """Dimension that a matrix sums over."""

    @property
    def infinite(self) -> tuple[float, ...]:
        """Ratios along the infinite dimensions."""
        return tuple(ratio for ratio in self.ratios if ratio is not None)

    @property
    def is_matrix(self) -> bool:
        """Whether it has two infinite dimensions."""
        return len(self.infinite) == 2

    @property
    def width(self) -> float:
        """Ratio of the inputs of a matrix, else of the infinite dimension, else 1."""
        if self.is_matrix:
            return self.ratios[self.inputs] or 1.0
        return self.infinite[0] if self.infinite else 1.0

    @property
    def std(self) -> float:
        """Factor of the initial standard deviation."""
        return self.width**-0.5 if self.is_matrix else 1.0

    def lr_scale(self, *, entrywise: bool) -> float:
        """Returns the factor of the learning rate.

        entrywise: whether the size of the optimizer's step does not depend on that of the gradient (Adam, Lion); else
        it is proportional to it (SGD).
        """
        if self.is_matrix:
            outputs = math.prod(self.infinite) / self.width
            return (1.0 if entrywise else outputs) / self.width
        return 1.0 if entrywise else self.width


@dataclass(frozen=True)
class Multipliers:
    """Factors of activations in a model; 1 without muP."""

    embedding: float = 1.0
    """Of the embedding's output."""
    output: float = 1.0
    """Of the output layer's input."""
    query: float = 1.0
    """Of queries."""
    scores: float = 1.0
    """Of positions that are added to scores."""
    relative: float = 1.0
    """Of learned relative positions, before `scores`."""
    router: float = 1.0
    """Of the router's input."""

    @classmethod
    def of(cls, mup: Any, dims: ModelDims) -> Multipliers:
        """Returns the factors of a configuration's mup section, or None.

        Scores are q k / sqrt(d), so with queries times sqrt(d0 / d) they are sqrt(d0) q k / d, which at the base's head
        dimension d0 is that of every model (section B.1 of the paper, and the package's advice). Learned relative
        positions are multiplied by sqrt(d) where they are added, which has to be sqrt(d0).
        """
        base = base_widths(mup)
        if base is None:
            return cls()
        heads = math.sqrt(base.head_dim / dims.head_dim)
        hidden = base.hidden_size / dims.hidden_size
        return cls(
            embedding=mup.mup_embedding_mult,
            output=hidden / mup.mup_output_temp,
            query=heads / mup.mup_attn_temp,
            scores=1 / mup.mup_attn_temp,
            relative=heads * mup.mup_rp_embedding_mult,
            router=hidden,
        )


def base_widths(mup: Any) -> MupWidths | None:
    """Returns the widths of the base model of a mup section; None where muP is off."""
    if mup is None or not mup.use_mup:
        return None
    return MupWidths(**mup.mup_base_widths)


def base_shapes(dims: ModelDims, widths: MupWidths) -> dict[str, BaseShape]:
    """Returns key -> shape in the base model for every tensor. widths: of the base."""
    own, wider = (tensors(each.on(dims), padded_vocab_size=1) for each in (widths, widths.times(2)))
    return {
        narrow.key: tuple(None if a == b else a for a, b in zip(narrow.shape, wide.shape, strict=True))
        for narrow, wide in zip(own, wider, strict=True)
    }


def width_ratios(dims: ModelDims, widths: MupWidths) -> dict[str, WidthRatio]:
    """Returns key -> width ratio for every tensor. widths: of the base."""
    base = base_shapes(dims, widths)
    return {
        shape.key: WidthRatio(
            tuple(
                None if narrow is None else size / narrow
                for size, narrow in zip(shape.shape, base[shape.key], strict=True)
            ),
            shape.inputs,
        )
        for shape in tensors(dims, padded_vocab_size=1)
    }


def learning_rates(mup: Any, dims: ModelDims, *, entrywise: bool) -> Mapping[str, float]:
    """Returns key -> factor of the learning rate for every tensor; {} without muP. entrywise: see lr_scale."""
    base = base_widths(mup)
    if base is None:
        return {}
    return {key: width_ratio.lr_scale(entrywise=entrywise) for key, width_ratio in width_ratios(dims, base).items()}
