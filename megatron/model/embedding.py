"""Layer 0: tokens become vectors, with positions added where the scheme adds them here.

Shapes: b micro batch, s sequence, h hidden, v padded vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.kernels.linear import LinearKernel
from megatron.model.cache import KVCache
from megatron.model.positions.base import Positions, document_positions
from megatron.parallel.embedding import VocabParallelEmbedding
from megatron.parallel.initialization import Fill, ParameterSource
from megatron.parallel.marks import mark_tied


class EmbeddingLayer(nn.Module):
    """Word embeddings, positions and dropout.

    positions: the scheme, or None for a copy that only serves as the output layer of a pipeline's last stage.
    model: the configuration's model section, read by the position scheme. tied: the word embedding is the output
    layer's matrix too. reset_positions: positions start again with each document.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        source: ParameterSource,
        *,
        fill: Fill,
        kernel: LinearKernel,
        positions: type[Positions] | None,
        model: object,
        dropout: float,
        tied: bool,
        dtype: torch.dtype,
        reset_positions: bool = False,
    ) -> None:
        super().__init__()
        self.reset_positions = reset_positions
        self.dropout = dropout
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size, hidden_size, source.of("word_embeddings"), fill=fill, kernel=kernel
        )
        if tied:
            mark_tied(self.word_embeddings.weight)
        self.position_embeddings = (
            positions.for_embedding(model, source.of("position_embeddings"), fill) if positions is not None else None
        )
        self.to(dtype)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """Token ids [b, s] -> hidden [s, b, h]. document_starts [b, s]: where the document of each token starts."""
        hidden = self.word_embeddings(tokens.t())  # [s, b, h]
        if self.position_embeddings is not None:
            positions = document_positions(document_starts) if self.reset_positions else None
            offset = 0 if cache is None else cache.length
            hidden = hidden + self.position_embeddings(tokens.shape[1], offset, positions)
        return F.dropout(hidden, self.dropout, self.training) if self.dropout > 0 else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The tied output layer: hidden [s, b, h] -> logits [s, b, v/t]."""
        return self.word_embeddings(hidden, as_output_layer=True)
