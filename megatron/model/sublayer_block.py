"""Blocks of one sublayer: a norm, and attention or an MLP (or experts) alone, x + sublayer(norm(x)).

With them a model has attention, MLPs and mixers in any order, as Nemotron-H has (arXiv:2504.03624).

Shapes: s sequence, b micro batch, h hidden. With sequence parallelism the residual stream is [s/t, b, h].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron.distributed.param_init import ParamFactory
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.model.block import Block
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import KVCache
from megatron.model.mlp.dense import ParallelMLP


class AttentionTransformerBlock(Block):
    """Attention alone. Block ``number`` (from 0) is layer number + 2 of the model."""

    attends = True

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__(spec, source.axis)
        self.input_layernorm = spec.norm()
        self.attention: Any = spec.attention[number](number, spec, source.of("attention"))
        self.zero3_gather_together = spec.dims.latent is not None  # its cache reads the weight of a projection
        self.to(spec.dtype)

    def forward(self, hidden: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """[s, b, h] -> [s, b, h].

        Args:
            hidden: Residual stream.
            cache: Keys and values of earlier tokens, or None.
            document_starts: Start of the document of each token [b, s].
        """
        return self.add(hidden, self.attention(self.input_layernorm(hidden), cache, document_starts))

    def linear_layers(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """Returns the projections of attention."""
        found: list[ColumnParallelLinear | RowParallelLinear] = self.attention.linear_layers()
        return found


class MLPTransformerBlock(Block):
    """An MLP or experts alone. Block ``number`` (from 0) is layer number + 2 of the model."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__(spec, source.axis)
        self.input_layernorm = spec.norm()
        self.mlp: Any = spec.mlp[number](spec, source.of("mlp"))
        self.takes_padding: bool = getattr(self.mlp, "takes_padding", False)
        self.to(spec.dtype)

    def forward(
        self,
        hidden: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """[s, b, h] -> [s, b, h]; it needs no cache, and tokens do not see each other.

        Args:
            hidden: Residual stream.
            cache: Not read.
            document_starts: Not read.
            padding: True for a token that the packing added [b, s]; read by experts alone.
        """
        more = (padding,) if self.takes_padding and padding is not None else ()
        return self.add(hidden, self.mlp(self.input_layernorm(hidden), *more))

    def linear_layers(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """Returns the linear layers of a dense MLP."""
        return [self.mlp.linear1, self.mlp.linear2] if isinstance(self.mlp, ParallelMLP) else []
