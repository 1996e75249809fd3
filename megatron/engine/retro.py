"""Inference with a model that attends to neighbours, which are found while a text grows. Nothing is cached.

s sequence, b batch, l whole chunks of a sequence, k neighbours of a chunk, r tokens of a neighbour, v padded
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import device
from megatron.engine.inference_forward import gather_vocabulary
from megatron.model.kv_cache import KVCache
from megatron.model.retro_model import run_retro
from megatron.param_table import RetroDims


@dataclass
class RetroEngine:
    """Computes logits; engine.py documents the methods."""

    layers: Sequence[Any]
    """All layers of the model, on one stage."""
    topology: Topology
    """Axes of this rank."""
    sizes: RetroDims
    """Of chunks and neighbours."""
    neighbors: Callable[[Tensor], Tensor]
    """Token ids [b, s] -> those of the neighbours of each whole chunk [b, l k r], the same on all ranks."""

    @torch.inference_mode()
    def logits(self, tokens: Tensor, cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        """Logits as engine.py says. Raises ValueError with a cache: a chunk's neighbours change what follows it."""
        if cache is not None:
            raise ValueError("a model that retrieves stores nothing of earlier tokens")
        tokens = tokens.to(device())
        joined = torch.cat((self.neighbors(tokens).to(device()), tokens), dim=1)
        logits = gather_vocabulary(run_retro(self.layers, self.sizes, joined), self.topology)
        return logits if at is None else logits.flatten(0, 1)[at.to(device())]

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        raise ValueError("a model that retrieves stores nothing of earlier tokens")
