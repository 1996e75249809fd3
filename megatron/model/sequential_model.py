"""The model as one module, for training without a pipeline and for generation.

Shapes: b micro batch, s sequence, h hidden, v padded vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.model.embedding import EmbeddingLayer
from megatron.model.kv_cache import KVCache
from megatron.model.layers import LayerSpec
from megatron.model.multi_token import FurtherLosses, FurtherToken, further_hidden
from megatron.model.recompute import Recompute, run_layers


class SequentialModel(nn.Module):
    """All layers in order; parameter names are ``sequential.<layer index>.<name>``."""

    def __init__(
        self,
        layer_specs: Sequence[LayerSpec],
        recompute: Recompute | None = None,
        further: FurtherLosses | None = None,
    ) -> None:
        """Builds the layers.

        Args:
            layer_specs: layers of the model.
            recompute: recomputation of blocks, or None.
            further: losses of the modules that predict further tokens, where there are any.
        """
        super().__init__()
        self.recompute, self.further = recompute, further
        self.behind = sum(issubclass(layer.layer, FurtherToken) for layer in layer_specs)
        self.sequential = nn.ModuleList()
        for layer in layer_specs:
            if layer.tied_to is None:
                self.sequential.append(layer.build())
            else:
                self.sequential.append(layer.layer(embedding=self.sequential[layer.tied_to], **layer.arguments))

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        targets: TokenTargets | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Token ids [b, s] -> logits [s, b, v/t], or the loss of the targets, an fp32 scalar.

        Args:
            tokens: Token ids [b, s], or [2, b, s] with token types behind them; with a cache they follow those already
                in it.
            cache: Keys, values and states of earlier tokens.
            document_starts: Start of the document of each token [b, s]; not together with a cache.
            targets: Labels and weights of the tokens; the loss is computed instead of logits.
            padding: True for a token that the packing of documents added [b, s].
        """
        *layers, head = list(self.sequential)[: len(self.sequential) - self.behind]
        carry = run_layers(layers, tokens, cache, self.recompute, document_starts, padding)  # [s, b, h]
        if targets is not None:
            loss: Tensor = head(carry, targets=targets)
            return (
                loss if not self._predicts_further else loss + self._further(carry, targets, document_starts, padding)
            )
        carry = head(carry, cache, document_starts)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return carry

    @property
    def _predicts_further(self) -> bool:
        return self.behind > 0 and self.training and torch.is_grad_enabled()

    def _further(
        self, hidden: Tensor, targets: TokenTargets, document_starts: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        """Returns the losses of the modules that predict further tokens, times their weight.

        Args:
            hidden: output of the final norm [s, b, h].
            targets: labels and weights of the tokens.
            document_starts: start of the document of each token [b, s].
            padding: True for a token that the packing of documents added [b, s].
        """
        assert self.further is not None
        first = len(self.sequential) - self.behind
        modules = [layer for layer in self.sequential[first:] if isinstance(layer, FurtherToken)]

        def run(block: nn.Module, x: Tensor) -> Tensor:
            return run_layers([block], x, None, self.recompute, document_starts, padding)

        embedding = cast(EmbeddingLayer, self.sequential[0])
        head = self.sequential[first - 1]

        def output(x: Tensor, own: TokenTargets) -> Tensor:
            loss: Tensor = head(x, targets=own)
            return loss

        further = further_hidden(modules, hidden, targets.labels, run, embedding)
        return self.further(further, targets, [output] * len(further), document_starts)
