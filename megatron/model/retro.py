"""A language model that attends to retrieved neighbours of its text (Retro, arXiv:2112.04426).

A text is cut into chunks of m tokens; k neighbours of r tokens were retrieved for each whole chunk. An encoder reads
the neighbours, and attends to the chunk that they were retrieved for. Chunked cross-attention lets the last token of a
chunk and the m - 1 tokens behind it attend to the chunk's encoded neighbours, so a token never sees neighbours that
were found by tokens after it. Neighbours are tokens in front of the text, chunk by chunk; some blocks of the decoder
attend to them, and the first of these has the encoder.

Shapes: s tokens of the text, b micro batch, h hidden, l whole chunks, m tokens of a chunk, k neighbours of a chunk,
r tokens of a neighbour, t tensor-parallel degree. Neighbours are [k r, l b, h] between the layers of this file.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.param_init import ParamFactory
from megatron.model.attention.cross import CrossAttention, EncoderAttention
from megatron.model.block import TransformerBlock
from megatron.model.block_spec import BlockSpec
from megatron.model.encoder_decoder import DecoderTransformerBlock
from megatron.model.kv_cache import KVCache
from megatron.registry import MLPS


def chunks_of(hidden: Tensor, chunk: int, count: int) -> Tensor:
    """The first chunks of a text [s, b, h] -> [m, l b, h]. chunk: m. count: l."""
    return hidden[: count * chunk].unflatten(0, (count, chunk)).transpose(0, 1).flatten(1, 2)


class NeighborBlock(TransformerBlock):
    """A block of the encoder of neighbours: attention inside each, to the chunk in the first block, and the MLP."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory, *, crosses: bool) -> None:
        """Builds the block.

        Args:
            number: of the decoder's block that has the encoder.
            spec: what blocks of the encoder share.
            source: of the block's parameters.
            crosses: whether it attends to the chunk.
        """
        super().__init__(number, spec, source)
        assert spec.dims.retro is not None
        self.neighbors = spec.dims.retro.neighbors
        self.cross_attention_layernorm = spec.norm() if crosses else None
        self.cross_attention = CrossAttention(number, spec, source.of("cross_attention")) if crosses else None
        self.to(spec.dtype)

    def encode(self, hidden: Tensor, chunk: Tensor) -> Tensor:
        """Neighbours [k r, l b, h] -> the same. chunk: the text that they were retrieved for [m, l b, h]."""
        before: Any = self.input_layernorm
        attended = self.attention(self._each(before(hidden)))
        hidden = self.add(hidden, self._together(attended))
        if self.cross_attention is not None:
            crossing: Any = self.cross_attention_layernorm
            hidden = self.add(hidden, self.cross_attention(crossing(hidden), chunk))
        between: Any = self.post_attention_layernorm
        return self.add(hidden, self.mlp(between(hidden)))

    def _each(self, x: Tensor) -> Tensor:
        """[k r, l b, h] -> [r, k l b, h]: every neighbour is a sequence of its own."""
        return x.unflatten(0, (self.neighbors, -1)).transpose(0, 1).flatten(1, 2)

    def _together(self, x: Tensor) -> Tensor:
        """[r, k l b, h] -> [k r, l b, h]."""
        return x.unflatten(1, (self.neighbors, -1)).transpose(0, 1).flatten(0, 1)


class NeighborEncoder(nn.ModuleList):
    """The blocks that read neighbours; their parameters are ``<number>.<name>``."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory, dropouts: tuple[float, float]) -> None:
        """Builds the blocks.

        Args:
            number: of the decoder's block that has the encoder.
            spec: what the decoder's blocks share.
            source: of the encoder's parameters.
            dropouts: of what attention and MLP add, and of attention [probability].
        """
        assert spec.dims.retro is not None
        own = replace(
            spec,
            attention=(EncoderAttention,) * len(spec.attention),
            mlp=(MLPS.load("dense"),) * len(spec.mlp),
            hidden_dropout=dropouts[0],
            attention_dropout=dropouts[1],
        )
        super().__init__(
            NeighborBlock(number, own, source.of(str(layer)), crosses=layer == 0)
            for layer in range(spec.dims.retro.encoder_layers)
        )

    def forward(self, hidden: Tensor, chunk: Tensor) -> Tensor:
        """Embedded neighbours [k r, l b, h] -> encoded ones. chunk: the text they were retrieved for [m, l b, h]."""
        for block in self:
            hidden = cast(NeighborBlock, block).encode(hidden, chunk)
        return hidden


class RetroBlock(DecoderTransformerBlock):
    """A block of the decoder with attention to neighbours, and, if it is the first one, their encoder."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory, dropouts: tuple[float, float]) -> None:
        """Builds the block.

        Args:
            number: of the block.
            spec: what the blocks share.
            source: of the block's parameters.
            dropouts: of the encoder; see NeighborEncoder.
        """
        super().__init__(number, spec, source)
        assert spec.dims.retro is not None
        self.sizes = spec.dims.retro
        first = number == self.sizes.blocks[0]
        self.retro_encoder = NeighborEncoder(number, spec, source.of("retro_encoder"), dropouts) if first else None

    def forward(
        self,
        hidden: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Neighbours and text [l k r + s, b, h] -> the same if it has the encoder, else the text [s, b, h].

        A text without a whole chunk has no neighbours, and is read as by a block without attention to them.

        Args:
            hidden: Neighbours, embedded or encoded, in front of the residual stream.
            cache: Not used: nothing of earlier tokens is stored.
            document_starts: Not used; layers have one signature.
            padding: Not used; layers have one signature.
        """
        count, batch = self.sizes.chunks(hidden.shape[0]), hidden.shape[1]
        if count == 0:
            return TransformerBlock.forward(self, hidden)
        neighbors, text = hidden.split([rows := count * self.sizes.tokens_of_chunk, hidden.shape[0] - rows])
        neighbors = neighbors.view(self.sizes.tokens_of_chunk, count * batch, -1)
        norms: Any = (self.input_layernorm, self.cross_attention_layernorm, self.post_attention_layernorm)
        with self.autocast() if self.training else nullcontext():
            normed, text = self._add_and_norm(norms[1], text, self.attention(norms[0](text)))
            if self.retro_encoder is not None:
                neighbors = self.retro_encoder(neighbors, chunks_of(normed, self.sizes.chunk, count))
            normed, text = self._add_and_norm(norms[2], text, self._attend_to_chunks(normed, neighbors, count))
            text = self.add(text, self.mlp(normed))
        return text if self.retro_encoder is None else torch.cat((neighbors.view(rows, batch, -1), text))

    def _attend_to_chunks(self, normed: Tensor, neighbors: Tensor, count: int) -> Tensor:
        """Chunked cross-attention of a text [s, b, h] -> [s, b, h], 0 for tokens before the end of the first chunk.

        Args:
            normed: input of the queries.
            neighbors: encoded neighbours [k r, l b, h].
            count: l.
        """
        chunk, skipped = self.sizes.chunk, self.sizes.chunk - 1
        attending = normed[skipped:]
        filled = F.pad(attending, (0, 0, 0, 0, 0, count * chunk - attending.shape[0]))  # [l m, b, h]
        attended = self.cross_attention(chunks_of(filled, chunk, count), neighbors)  # [m, l b, h]
        inner = attended.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)[: attending.shape[0]]
        return F.pad(inner, (0, 0, 0, 0, skipped, 0))
