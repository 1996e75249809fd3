"""The model as one module, for training without a pipeline and for generation.

Shapes: b micro batch, s sequence, h hidden, v padded vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.model.kv_cache import KVCache
from megatron.model.layers import LayerSpec
from megatron.model.recompute import Recompute, run_layers


class SequentialModel(nn.Module):
    """All layers in order; parameter names are ``sequential.<layer index>.<name>``."""

    def __init__(self, layer_specs: Sequence[LayerSpec], recompute: Recompute | None = None) -> None:
        super().__init__()
        self.recompute = recompute
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
        *layers, head = self.sequential
        carry = run_layers(layers, tokens, cache, self.recompute, document_starts, padding)  # [s, b, h]
        carry = head(carry, cache, document_starts) if targets is None else head(carry, targets=targets)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return carry
