"""Encoders of queries and passages as one module: one for each, or one for both.

Shapes: q queries, p passages, s sequence, d width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.model.kv_cache import KVCache
from megatron.model.layers import LayerSpec
from megatron.model.recompute import Recompute, run_layers


class RetrievalModel(nn.Module):
    """All layers of both encoders; parameter names are ``sequential.<layer index>.<name>``."""

    def __init__(
        self, layer_specs: Sequence[LayerSpec], towers: int, queries: int, recompute: Recompute | None = None
    ) -> None:
        """Builds the layers.

        Args:
            layer_specs: layers of the model, those of the encoder of queries first.
            towers: number of encoders.
            queries: of a micro batch; the other sequences are passages.
            recompute: recomputation of blocks, or None.
        """
        super().__init__()
        self.recompute, self.towers, self.queries = recompute, towers, queries
        self.sequential = nn.ModuleList(layer.build() for layer in layer_specs)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        targets: TokenTargets | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Token ids [q + p, s] -> embeddings [q + p, d].

        Args:
            tokens: Token ids [q + p, s], or [2, q + p, s] with token types behind them; queries come first.
            cache: None; engines have one signature.
            document_starts: Start of the document of each token [q + p, s].
            targets: None; the loss is computed from embeddings.
            padding: None; no block has experts.
        """
        if self.towers == 1:
            return self.embed(0, tokens, document_starts)
        starts: Sequence[Tensor | None] = (None, None)
        sizes = [self.queries, tokens.shape[-2] - self.queries]
        if document_starts is not None:
            starts = document_starts.split(sizes)
        parts = enumerate(zip(tokens.split(sizes, dim=-2), starts, strict=True))
        return torch.cat([self.embed(tower, part.contiguous(), start) for tower, (part, start) in parts])

    def embed(self, tower: int, tokens: Tensor, document_starts: Tensor | None) -> Tensor:
        """Returns the embeddings of texts [b, d].

        Args:
            tower: 0 for queries, 1 for passages; with one encoder it is the same.
            tokens: token ids [b, s], or [2, b, s] with token types behind them.
            document_starts: start of the document of each token [b, s].
        """
        count = len(self.sequential) // self.towers
        first = count * min(tower, self.towers - 1)
        layers = list(self.sequential)[first : first + count]
        return run_layers(layers, tokens, None, self.recompute, document_starts)
