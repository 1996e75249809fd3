"""Which dimensions of a model's tensors grow with its width, and what follows from it (muP, arXiv:2203.03466).

Maximal update parametrisation compares a model with a base model that differs from it in widths alone. A dimension that
grows with them is called infinite, any other (vocabulary, positions, experts) finite. A tensor with two infinite
dimensions is a matrix of features by features, one with a single one is like a vector: a bias, a norm, an embedding, an
output layer. Table 8 of the paper, which the authors' package `mup` follows as well, says what each of them gets.

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
class Widths:
    """The numbers of a model that muP lets grow."""

    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int

    @classmethod
    def of(cls, dims: ModelDims) -> Widths:
        """Those of a model."""
        return cls(**{name: getattr(dims, name) for name in cls.__annotations__})

    def on(self, dims: ModelDims) -> ModelDims:
        """The model that has these widths and is otherwise the same."""
        return replace(dims, **asdict(self))

    def times(self, factor: int) -> Widths:
        """All of them larger."""
        return Widths(**{name: value * factor for name, value in asdict(self).items()})


@dataclass(frozen=True)
class WidthRatio:
    """A tensor of a model beside that of its base.

    ratios: along each dimension, None where it is finite. inputs: the dimension that a matrix sums over.
    """

    ratios: tuple[float | None, ...]
    inputs: int = -1

    @property
    def infinite(self) -> tuple[float, ...]:
        """The ratios along the dimensions that grow."""
        return tuple(ratio for ratio in self.ratios if ratio is not None)

    @property
    def is_matrix(self) -> bool:
        """Whether it maps features that grow to features that grow."""
        return len(self.infinite) == 2

    @property
    def width(self) -> float:
        """How much wider it is: by its inputs where it is a matrix, else by its one infinite dimension, else 1."""
        if self.is_matrix:
            return self.ratios[self.inputs] or 1.0
        return self.infinite[0] if self.infinite else 1.0

    @property
    def deviation(self) -> float:
        """Factor of the base's initial standard deviation."""
        return self.width**-0.5 if self.is_matrix else 1.0

    def rate(self, *, entrywise: bool) -> float:
        """Factor of the learning rate.

        entrywise: of an optimizer whose step has a size of its own in every entry (Adam, Lion); else of one whose step
        is as large as the gradient (SGD).
        """
        if self.is_matrix:
            outputs = math.prod(self.infinite) / self.width
            return (1.0 if entrywise else outputs) / self.width
        return 1.0 if entrywise else self.width


@dataclass(frozen=True)
class Multipliers:
    """Factors inside a model: 1 each without muP.

    embedding: of what the embedding puts out. output: of what the output layer takes in. query: of queries. scores: of
    what positions add to scores. relative: of learned relative positions, before that. router: of what a router takes
    in.
    """

    embedding: float = 1.0
    output: float = 1.0
    query: float = 1.0
    scores: float = 1.0
    relative: float = 1.0
    router: float = 1.0

    @classmethod
    def of(cls, mup: Any, dims: ModelDims) -> Multipliers:
        """Of a configuration's mup section, or None.

        Scores are q k / sqrt(d), so with queries times sqrt(d0 / d) they are sqrt(d0) q k / d, which at the base's head
        dimension d0 is what every model has (section B.1 of the paper, and the package's advice). Learned relative
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


def base_widths(mup: Any) -> Widths | None:
    """The widths of the base model that a mup section speaks of; None where muP is off."""
    if mup is None or not mup.use_mup:
        return None
    return Widths(**mup.mup_base_widths)


def base_shapes(dims: ModelDims, widths: Widths) -> dict[str, BaseShape]:
    """Key -> shape in the base model, of every tensor of a model. widths: of the base."""
    own, wider = (tensors(each.on(dims), padded_vocab_size=1) for each in (widths, widths.times(2)))
    return {
        narrow.key: tuple(None if a == b else a for a, b in zip(narrow.shape, wide.shape, strict=True))
        for narrow, wide in zip(own, wider, strict=True)
    }


def growths(dims: ModelDims, widths: Widths) -> dict[str, WidthRatio]:
    """Key -> growth of every tensor of a model over its base. widths: of the base."""
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
    """Key -> factor of the learning rate, for every tensor; {} without muP. entrywise: see Growth.rate."""
    base = base_widths(mup)
    if base is None:
        return {}
    return {key: growth.rate(entrywise=entrywise) for key, growth in growths(dims, base).items()}
