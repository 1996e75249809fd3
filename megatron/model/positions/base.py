"""Interface of position schemes: at the embedding, in attention, or neither."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.distributed.param_init import InitFn, ParamFactory
from megatron.kernels.rotary import RotaryPair
from megatron.param_table import Multipliers


def document_positions(document_starts: Tensor | None) -> Tensor | None:
    """Returns the position of each token in its document, [b, s]; None without document starts."""
    if document_starts is None:
        return None
    return torch.arange(document_starts.shape[1], device=document_starts.device) - document_starts


class AttentionPositions(Protocol):
    """Positions applied in attention, the same object for all blocks."""

    def __call__(self, x: Tensor, offset: int, positions: Tensor | None = None) -> Tensor:
        """Applies positions to queries or keys [b, n, s, d] whose first position is ``offset``.

        positions [b, s]: position of each token instead of offset, offset + 1, ...
        """

    def pair(self, q: Tensor, k: Tensor, offset: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Applies positions to queries [b, n, s, d] and keys [b, m, s, d]; see __call__.

        Args:
            q: Queries.
            k: Keys.
            offset: Position of the first token.
            positions: Position of each token instead [b, s].
        """

    def table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines of at least ``length`` positions, fp32 [length, r/2] each; r features are
        rotated.
        """


class Positions:
    """Base class of the schemes a configuration can name. A builder returns None if it adds nothing."""

    @classmethod
    def for_embedding(cls, model: Any, source: ParamFactory, init_fn: InitFn) -> nn.Module | None:
        """Builds a module (length, offset, positions, device) -> [length, 1 or b, h], added to the word embeddings.

        positions: as in AttentionPositions, or None. model: the configuration's model section.
        """
        return None

    @classmethod
    def for_scores(cls, model: Any, source: ParamFactory, multipliers: Multipliers) -> nn.Module | None:
        """Builds a module (length, device) -> [n/t, length], added to the scores by distance 0, 1, ...

        n/t: this rank's heads. All blocks share the module. Where the scheme has the trait LINEAR_BIAS, its method
        `slopes_on(device)` returns fp32 [n/t], and the bias is -slope * distance.
        """
        return None

    @classmethod
    def for_attention(cls, model: Any, head_dim: int, kernel: RotaryPair) -> AttentionPositions | None:
        """Builds what attention applies to queries and keys."""
        return None
