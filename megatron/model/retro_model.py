"""A language model with attention to retrieved neighbours as one module, for training and for scores.

Shapes as in retro.py: s tokens of the text, b micro batch, h hidden, l whole chunks, k neighbours of a chunk, r tokens
of a neighbour, v padded vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.model.embedding import EmbeddingLayer
from megatron.model.kv_cache import KVCache
from megatron.model.layers import LayerSpec
from megatron.model.recompute import Recompute, run_layers
from megatron.model.retro import RetroBlock
from megatron.model.sequential_model import SequentialModel
from megatron.param_table import RetroDims


class RetroModel(SequentialModel):
    """All layers in order; parameter names are ``sequential.<layer index>.<name>``."""

    def __init__(self, layer_specs: Sequence[LayerSpec], sizes: RetroDims, recompute: Recompute | None = None) -> None:
        """Builds the layers.

        Args:
            layer_specs: layers of the model.
            sizes: of chunks and neighbours.
            recompute: recomputation of blocks, or None.
        """
        super().__init__(layer_specs, recompute)
        self.sizes = sizes

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        targets: TokenTargets | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Token ids [b, l k r + s] -> logits [s, b, v/t], or the loss of the targets, an fp32 scalar.

        Args:
            tokens: Token ids: the neighbours of each whole chunk of the text, then the text.
            cache: None; nothing of earlier tokens is stored.
            document_starts: None; a text attends to all tokens before.
            targets: Labels and weights of the text; the loss is computed instead of logits.
            padding: None; a text has none.
        """
        return run_retro(list(self.sequential), self.sizes, tokens, targets, self.recompute)


def run_retro(
    layers: Sequence[Any],
    sizes: RetroDims,
    tokens: Tensor,
    targets: TokenTargets | None = None,
    recompute: Recompute | None = None,
) -> Tensor:
    """Runs a model over neighbours and texts; the arguments are those of RetroModel.

    Args:
        layers: all layers of the model.
        sizes: of chunks and neighbours.
        tokens: token ids [b, l k r + s].
        targets: labels and weights of the text, or None for logits.
        recompute: recomputation of blocks, or None.
    """
    count = sizes.chunks(tokens.shape[1])
    embedding, *others, head = layers
    neighbors, text = tokens.split([rows := count * sizes.tokens_of_chunk, tokens.shape[1] - rows], dim=1)
    hidden = embedding(text.contiguous())
    context = _embedded(embedding, neighbors, sizes, count) if count else None
    for layer in others:
        if context is None or not isinstance(layer, RetroBlock):
            hidden = run_layers([layer], hidden, None, recompute)
            continue
        hidden = run_layers([layer], torch.cat((context, hidden)), None, recompute)
        if layer.retro_encoder is not None:
            context, hidden = hidden.split([rows, text.shape[1]])
    output: Tensor = head(hidden) if targets is None else head(hidden, targets=targets)
    return output


def _embedded(embedding: EmbeddingLayer, neighbors: Tensor, sizes: RetroDims, count: int) -> Tensor:
    """Neighbours [b, l k r] -> [k r l, b, h]; positions start at 0 in each.

    Args:
        embedding: layer 0.
        neighbors: token ids.
        sizes: of chunks and neighbours.
        count: l.
    """
    each = neighbors.unflatten(1, (count, sizes.neighbors, -1)).permute(2, 1, 0, 3)  # [k, l, b, r]
    hidden: Tensor = embedding(each.flatten(0, 2))  # [r, k l b, h]
    together = hidden.unflatten(1, (*each.shape[:2], -1)).permute(1, 0, 2, 3, 4)  # [k, r, l, b, h]
    return together.flatten(0, 2)
