"""Learned positions: one vector a position, added to the word embeddings. Shapes: s sequence, h hidden."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.param_attrs import mark_embedding_like
from megatron.distributed.param_init import InitFn, ParamFactory
from megatron.model.positions.base import Positions


class LearnedPositions(Positions, nn.Module):
    """Learned position embeddings, parameter ``weight`` [skipped + max positions, h], replicated.

    Args:
        max_positions: Number of positions.
        hidden_size: Columns of the weight.
        source: Creates the parameter.
        init_fn: Initial values.
        skipped: Rows before that of position 0.
    """

    def __init__(
        self, max_positions: int, hidden_size: int, source: ParamFactory, init_fn: InitFn, skipped: int = 0
    ) -> None:
        super().__init__()
        self.skipped = skipped
        self.weight = source.replicated("weight", (skipped + max_positions, hidden_size), init_fn)
        mark_embedding_like(self.weight)

    @classmethod
    def for_embedding(cls, model: Any, source: ParamFactory, init_fn: InitFn) -> nn.Module:
        """Builds the table of the model section's max_position_embeddings and opt_pos_emb_offset."""
        return cls(model.max_position_embeddings, model.hidden_size, source, init_fn, model.opt_pos_emb_offset)

    def forward(self, length: int, offset: int, positions: Tensor | None, device: torch.device) -> Tensor:
        """Returns the vectors of positions offset .. offset + length - 1, [s, 1, h]. IndexError past the last one.

        Args:
            length: Number of positions.
            offset: First position.
            positions: Position of each token [b, s], below length; the result is then [s, b, h].
            device: Device of the result.
        """
        rows = self.weight[self.skipped :]
        if offset + length > rows.shape[0]:
            raise IndexError(f"position {offset + length - 1} is past the {rows.shape[0]} learned positions")
        if positions is not None:
            return F.embedding(positions.t(), rows)  # [s, b, h]
        return rows[offset : offset + length].unsqueeze(1)  # [s, 1, h]
