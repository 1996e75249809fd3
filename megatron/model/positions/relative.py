"""Relative positions of an encoder-decoder (arXiv:1910.10683, section 2.1): a learned bias a head for each bucket of
distance, with a table for the encoder and one for the decoder.

Each stack shares its table. Both are rows of one tensor, `attention.rpe.weight` of block 0: first those of the encoder,
half of them for earlier tokens and half for later ones, then those of the decoder. Unlike `rpe` the values are added to
the scores as they are.

Shapes: n heads, t tensor-parallel degree, s queries, k keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron.distributed.param_attrs import mark_embedding_like, mark_tied
from megatron.distributed.param_init import ParamFactory
from megatron.model.init import xavier_normal
from megatron.model.positions.base import Positions
from megatron.model.positions.rpe import buckets
from megatron.param_table import Multipliers


class EncoderDecoderPositions(Positions, nn.Module):
    """Parameter ``weight`` [2 * buckets, n/t]."""

    def __init__(self, count: int, max_distance: int, heads: int, source: ParamFactory) -> None:
        """Creates the parameter.

        Args:
            count: Buckets of each stack.
            max_distance: Distance from which on all are in the last bucket.
            heads: Attention heads of all ranks.
            source: Creates the parameter.
        """
        super().__init__()
        self.count, self.max_distance = count, max_distance
        init_fn = xavier_normal(std=1.0, num_layers=1, hidden_size=1)  # unused by this initialization
        self.weight = source.sharded("weight", (2 * count, heads), init_fn, dim=1)
        mark_embedding_like(self.weight)
        mark_tied(self.weight)

    @classmethod
    def for_scores(cls, model: Any, source: ParamFactory, multipliers: Multipliers) -> nn.Module:
        """Builds it from the model section's rpe_num_buckets and rpe_max_distance."""
        return cls(model.rpe_num_buckets, model.rpe_max_distance, model.num_attention_heads, source)

    def forward(self, length: int, device: torch.device, *, encodes: bool = False) -> Tensor:
        """Returns the decoder's bias at distances 0 .. length - 1, fp32 [n/t, length].

        Args:
            length: Of the sequence [tokens].
            device: Device of the result.
            encodes: Return the encoder's bias of each query and key instead, [n/t, length, length]; a key behind the
                query has a bucket of the second half.
        """
        if not encodes:
            bucket = buckets(length, self.count, self.max_distance, device)
            return self.weight[self.count :].float()[bucket].t()
        half = self.count // 2
        bucket = buckets(length, half, self.max_distance, device)  # of distances 0 .. length - 1
        by_offset = torch.cat((bucket.flip(0), bucket[1:] + half))  # of key - query from 1 - length on
        bias = self.weight[: self.count].float()[by_offset].t()  # [n/t, 2 length - 1]
        return bias.unfold(1, length, 1).flip(1)  # [n/t, s, k]: the row of query i starts at key - query = -i
