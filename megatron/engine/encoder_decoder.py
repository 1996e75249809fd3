"""Inference with an encoder-decoder: the encoder runs once for a text, the decoder once for each token.

s sequence, b batch, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import device
from megatron.engine.inference_engine import InferenceEngine
from megatron.engine.inference_forward import gather_vocabulary
from megatron.model.encoder_decoder import DecoderTransformerBlock, EncoderDecoderEmbedding, EncoderTransformerBlock
from megatron.model.kv_cache import KVCache, cache_dtype
from megatron.model.source_cache import SourceCache
from megatron.param_table import ModelDims


@dataclass
class EncoderDecoderEngine:
    """Computes logits of what follows a source; engine.py documents the methods.

    An empty cache takes sources, and gives the logits of the first token that follows each.
    """

    layers: Sequence[Any]
    """All layers of the model, on one stage."""
    topology: Topology
    """Axes of this rank."""
    make_cache: Callable[[int, int], SourceCache]
    """(batch, max length) -> an empty cache."""
    start: int
    """The id that the decoder starts with."""

    @classmethod
    def of(cls, engine: InferenceEngine, start: int, dims: ModelDims) -> EncoderDecoderEngine:
        """Takes the layers of an engine.

        Args:
            engine: The engine, with all layers of the model.
            start: The id that the decoder starts with.
            dims: Sizes of the model.
        """

        def make(batch: int, max_length: int) -> SourceCache:
            return SourceCache(
                dims.num_layers - dims.encoder_layers,
                batch,
                dims.num_kv_heads // engine.topology.model.size,
                max_length,
                dims.head_dim,
                dtype=cache_dtype(engine.dtype, device(), dims.head_dim),
                device=device(),
                first_layer=dims.encoder_layers,
            )

        return cls(engine.stage.functions, engine.topology, make, start)

    @torch.inference_mode()
    def logits(self, tokens: Tensor, cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        """Logits of the next token, fp32 [b, 1, v], or [b, v] with `at`, the last tokens of the sources.

        Raises ValueError without a cache, since tokens alone do not say where a source ends.
        """
        if not isinstance(cache, SourceCache):
            raise ValueError("an encoder-decoder has no scores of the text that it reads")
        tokens = tokens.to(device())
        if cache.length == 0:
            self._encode(tokens, cache)
            tokens = torch.full((len(tokens), 1), self.start, device=tokens.device)
        embedding, *layers = self.layers
        hidden = embedding(tokens, cache)
        for layer in layers:
            if not isinstance(layer, EncoderTransformerBlock):
                hidden = layer(hidden, cache)
        cache.advance(tokens.shape[1])
        logits = gather_vocabulary(hidden, self.topology).contiguous()  # [b, 1, v]
        return logits if at is None else logits[:, -1]

    def new_cache(self, batch: int, max_length: int) -> SourceCache:
        return self.make_cache(batch, max_length)

    def _encode(self, tokens: Tensor, cache: SourceCache) -> None:
        """Runs the encoder over sources [b, s], and stores the keys and values of its output for each block."""
        length = tokens.shape[1]
        lengths = cache.begin(length).to(tokens.device)[:, None]
        starts = torch.where(torch.arange(length, device=tokens.device) < lengths, 0, lengths)  # [b, s]
        embedding = self.layers[0]
        assert isinstance(embedding, EncoderDecoderEmbedding)
        hidden = embedding.embed(tokens)
        for layer in self.layers:
            if isinstance(layer, EncoderTransformerBlock):
                hidden = layer.encode(hidden, starts)
        for layer in self.layers:
            if isinstance(layer, DecoderTransformerBlock):
                cache.set_encoded(layer.number, *layer.cross_attention.keys_and_values(hidden))
