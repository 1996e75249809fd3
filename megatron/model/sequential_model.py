"""The model as one module, for training without a pipeline and for generation.

Shapes: b micro batch, s sequence, h hidden, v padded vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

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
                self.sequential.append(layer.layer(embedding=self.sequential[layer.tied_to]))

    def forward(self, tokens: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """Token ids [b, s] -> logits [s, b, v/t]. With a cache the tokens follow those already in it.

        document_starts [b, s]: start of the document of each token; not together with a cache.
        """
        carry = run_layers(list(self.sequential), tokens, cache, self.recompute, document_starts)  # [s, b, v/t]
        if cache is not None:
            cache.advance(tokens.shape[1])
        return carry
