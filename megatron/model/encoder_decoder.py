"""The layers of an encoder-decoder (arXiv:1706.03762; T5, arXiv:1910.10683) that one stack of blocks does not have.

Layers have one tensor as input and output in every engine and pipeline, so the activations of both stacks are joined
along the sequence: first the encoder's, then the decoder's, [s + u, b, h]. A block of the encoder changes the first
part and passes the other on; a block of the decoder reads both and changes the second part. With sequence parallelism
each part is a shard of its sequence, [(s + u)/t, b, h].

The blocks of the encoder come first, and the last one has the encoder's final norm. With a cache the carry is the
decoder's part alone; the engine runs the encoder before (`engine/encoder_decoder.py`).

Shapes: s encoder tokens, u decoder tokens, b micro batch, h hidden, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from megatron.distributed.param_init import ParamFactory
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.model.attention.cross import CrossAttention
from megatron.model.block import TransformerBlock
from megatron.model.block_spec import BlockSpec
from megatron.model.embedding import EmbeddingLayer
from megatron.model.head import FinalNorm, Head, TiedHead, rows_with_loss
from megatron.model.kv_cache import KVCache
from megatron.model.model_spec import ModelSpec
from megatron.model.real_tokens import RealTokens
from megatron.model.source_cache import SourceCache


class EncoderDecoderEmbedding(EmbeddingLayer):
    """The word embeddings of both stacks; positions start at 0 in each."""

    def __init__(self, spec: ModelSpec, blocks: BlockSpec, *, as_output_copy: bool = False) -> None:
        """Builds the layer; the arguments are those of an EmbeddingLayer."""
        super().__init__(spec, blocks, as_output_copy=as_output_copy)
        self.encoder_length = blocks.encoder_length

    def forward(self, tokens: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """Token ids [b, s + u] -> hidden [s + u, b, h]; with a cache the decoder's alone."""
        if cache is not None:
            return super().forward(tokens, cache)
        parts = tokens[:, : self.encoder_length], tokens[:, self.encoder_length :]
        return torch.cat([self.embed(part) for part in parts])

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [b, s] of one stack -> hidden [s, b, h]."""
        return super().forward(tokens)


class EncoderTransformerBlock(TransformerBlock):
    """A block of the encoder."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__(number, spec, source)
        self.encoder_length, self.encoder_rows = spec.encoder_length, spec.encoder_rows
        self.encoder_layernorm = spec.norm() if number == spec.dims.encoder_layers - 1 else None
        self.to(spec.dtype)

    def forward(
        self,
        hidden: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """[s + u, b, h] -> [s + u, b, h].

        Args:
            hidden: Residual streams.
            cache: Not used: the encoder runs once.
            document_starts: 0 where a token of the encoder is not padding, [b, s + u].
            padding: Not used; layers have one signature.
        """
        starts = None if document_starts is None else document_starts[:, : self.encoder_length]
        return torch.cat((self.encode(hidden[: self.encoder_rows], starts), hidden[self.encoder_rows :]))

    def encode(self, hidden: Tensor, starts: Tensor | None) -> Tensor:
        """Residual stream of the encoder [s, b, h] -> the same. starts: 0 where a token is not padding, [b, s]."""
        real = RealTokens.of(None if starts is None else starts == 0, self.axis)
        hidden = super().forward(hidden if real is None else real.pack(hidden), None, starts)
        hidden = hidden if self.encoder_layernorm is None else self.encoder_layernorm(hidden)
        return hidden if real is None else real.unpack(hidden)


class DecoderTransformerBlock(TransformerBlock):
    """A block of the decoder: attention to its own tokens, to the encoder's, and the MLP."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__(number, spec, source)
        self.encoder_length, self.encoder_rows = spec.encoder_length, spec.encoder_rows
        self.number = number
        self.cross_attention_layernorm = spec.norm()
        self.cross_attention = CrossAttention(number, spec, source.of("cross_attention"))
        self.to(spec.dtype)

    def forward(
        self,
        hidden: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """[s + u, b, h] -> [s + u, b, h]; with a cache the decoder's part, [u, b, h].

        Args:
            hidden: Residual streams.
            cache: Keys and values of the encoder's output and of earlier tokens, or None.
            document_starts: 0 where a token of the encoder is not padding, [b, s + u].
            padding: Not used; layers have one signature.
        """
        if cache is not None:
            assert isinstance(cache, SourceCache)
            return self._decode(hidden, None, None, cache)
        encoded, own = hidden[: self.encoder_rows], hidden[self.encoder_rows :]
        shown = None if document_starts is None else document_starts[:, : self.encoder_length] == 0
        return torch.cat((encoded, self._decode(own, encoded, shown, None)))

    def _decode(
        self, hidden: Tensor, encoded: Tensor | None, shown: Tensor | None, cache: SourceCache | None
    ) -> Tensor:
        norms: Any = (self.input_layernorm, self.cross_attention_layernorm, self.post_attention_layernorm)
        with self.autocast() if self.training else nullcontext():
            attended = self.attention(norms[0](hidden), cache)
            normed, hidden = self._add_and_norm(norms[1], hidden, attended)
            crossed = self.cross_attention(normed, encoded, shown, cache)
            normed, hidden = self._add_and_norm(norms[2], hidden, crossed)
            return self.add(hidden, self.mlp(normed))

    def _add_and_norm(self, norm: Any, hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a term to the residual stream; returns the norm of the sum, and the sum."""
        if self.takes_residual and (self.dropout == 0 or not self.training):
            both: tuple[Tensor, Tensor] = norm(x, hidden)
            return both
        hidden = self.add(hidden, x)
        return norm(hidden), hidden


class DecoderNorm(FinalNorm):
    """The final norm, of the decoder's part."""

    def __init__(self, norm: Callable[[], nn.Module], dtype: torch.dtype, encoder_rows: int) -> None:
        super().__init__(norm, dtype)
        self.encoder_rows = encoder_rows

    def forward(self, hidden: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """[s + u, b, h] -> [u, b, h]; with a cache the decoder's part alone comes in."""
        return super().forward(hidden if cache is not None else hidden[self.encoder_rows :])


class DecoderHead(Head):
    """The output layer with a matrix of its own, which leaves out padding of the decoder on a CPU."""

    def forward(
        self,
        hidden: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        targets: TokenTargets | None = None,
    ) -> Tensor:
        """[u, b, h] -> logits [u, b, v/t], or the loss of the targets; see Head.

        Args:
            hidden: Output of the final norm [u, b, h].
            cache: Not used; layers have one signature.
            document_starts: Not used; layers have one signature.
            targets: Labels and weights of the tokens.
        """
        if targets is not None:
            hidden, targets = rows_with_loss(hidden, targets, self.final_linear.axis)
        return super().forward(hidden, targets=targets)


class TiedDecoderHead(TiedHead):
    """The tied output layer, which leaves out padding of the decoder on a CPU."""

    def forward(
        self,
        hidden: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        targets: TokenTargets | None = None,
    ) -> Tensor:
        """[u, b, h] -> logits [u, b, v/t], or the loss of the targets; see Head.

        Args:
            hidden: Output of the final norm [u, b, h].
            cache: Not used; layers have one signature.
            document_starts: Not used; layers have one signature.
            targets: Labels and weights of the tokens.
        """
        if targets is not None:
            hidden, targets = rows_with_loss(hidden, targets, self._embedding[0].axis)
        return super().forward(hidden, targets=targets)
