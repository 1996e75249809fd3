"""Value residual (ResFormer, arXiv:2410.17897): every block after the first mixes its values with those of the first.

A block's values are a v + b v1, with v1 the values of the first block and two learned factors a and b. Layers have one
tensor as input and output in every engine and pipeline, so v1 is joined to the residual stream between the first and
the last block. Both parts stay in one piece of memory each, and so are views: the carry is [h + w, s/t, b], whose first
h rows are the memory of the residual stream [s/t, b, h], and whose other rows are that of the values [s, b, m d/t].

Shapes: s sequence, b micro batch, h hidden, m key/value heads, d head dim, t tensor-parallel degree; w features of the
values for a token of the residual stream: m d/t, and with sequence parallelism, where a rank has s/t of these tokens,
m d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.distributed.mesh import Axis
from megatron.distributed.param_init import ParamFactory
from megatron.distributed.partial_grads import mark_partial_grad
from megatron.model.block import TransformerBlock
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import KVCache
from megatron.param_table import FIRST_BLOCK, ModelDims


def halves(tensor: Tensor, generator: torch.Generator) -> None:
    """The InitFn of the factors: the mean of both values."""
    tensor.fill_(0.5)


@dataclass(frozen=True)
class CarryShape:
    """Shapes of what passes from layer to layer, for stages that receive it."""

    hidden: int
    """Width of the residual stream."""
    values: int = 0
    """Features of the values that go with it for each of its tokens."""
    layers: range = range(0)
    """Layers whose input has these values."""

    @classmethod
    def of(cls, dims: ModelDims, axis: Axis) -> CarryShape:
        """Returns the shapes of a model. axis: tensor-parallel ranks."""
        if not dims.value_residual:
            return cls(dims.hidden_size)
        values = max(dims.head_dim, dims.kv_size // axis.size) * (axis.size if axis.sequence_parallel else 1)
        return cls(dims.hidden_size, values, range(FIRST_BLOCK + 1, FIRST_BLOCK + dims.num_layers))

    def into(self, layer: int, rows: int, batch: int) -> tuple[int, int, int]:
        """Returns the shape of a layer's input.

        Args:
            layer: index of the layer in the model, not that of the embedding.
            rows: tokens of the residual stream of each sample.
            batch: samples.
        """
        return (self.hidden + self.values, rows, batch) if layer in self.layers else (rows, batch, self.hidden)


class ValueResidual(nn.Module):
    """Mixes the values of one block with those of the first; in the first block it only records its own.

    `first` is set by the block around it for the time of a forward pass.
    """

    first: Tensor | None = None
    """Values of the first block, in the memory of [s, b, m/t, d]."""

    def __init__(self, source: ParamFactory, *, records: bool) -> None:
        """Creates the factors.

        Args:
            source: of the parameters.
            records: true in the first block, which has none.
        """
        super().__init__()
        self.factors: nn.Parameter | None = None
        if not records:
            self.factors = source.replicated("factors", (2,), halves, full_sequence=True)
            if source.axis.size > 1:  # each rank has the term of its heads
                mark_partial_grad(self.factors, source.axis)

    def forward(self, values: Tensor) -> Tensor:
        """Values [s, b, m/t, d] -> the values that the block attends to."""
        if self.factors is None:
            self.first = values
            return values
        assert self.first is not None, "the block sets it"
        own, shared = self.factors.unbind()
        return own * values + shared * self.first.view(values.shape)

    def take(self) -> Tensor:
        """Returns the values of the first block, and forgets them."""
        first, self.first = self.first, None
        assert first is not None, "attention has run"
        return first


class ValueResidualTransformerBlock(TransformerBlock):
    """A block of attention and MLP that reads, or is the first to compute, the shared values."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__(number, spec, source)
        self.layer, self.carry = number + FIRST_BLOCK, CarryShape.of(spec.dims, source.axis)

    def forward(
        self,
        hidden: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Residual stream and values [h + w, s/t, b] -> the same; see the top of the file.

        Args:
            hidden: The carry; for the first block the residual stream alone, [s/t, b, h].
            cache: Keys and values of earlier tokens, or None.
            document_starts: Start of the document of each token [b, s].
            padding: As for TransformerBlock.
        """
        mix: Any = self.attention.value_residual
        if self.layer in self.carry.layers:
            rows, batch = hidden.shape[1:]
            hidden, mix.first = hidden.split((self.carry.hidden, self.carry.values))
            hidden = hidden.reshape(rows, batch, self.carry.hidden)
        hidden = super().forward(hidden, cache, document_starts, padding)
        values = mix.take()
        if self.layer + 1 not in self.carry.layers:
            return hidden
        rows, batch = hidden.shape[:2]
        return torch.cat((hidden.reshape(-1, rows, batch), values.reshape(-1, rows, batch)))

    def input_shape(self, hidden: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns the shape of its input. hidden: that of the residual stream, [s, b, h]."""
        return self.carry.into(self.layer, *hidden[:2])
