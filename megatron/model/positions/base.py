"""What a position scheme is: something at the embedding, something in attention, or neither."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.distributed.param_init import InitFn, ParamFactory
from megatron.kernels.rotary import RotaryKernel
from megatron.param_table import Multipliers


def document_positions(document_starts: Tensor | None) -> Tensor | None:
    """The position of each token in its document, [b, s], from where that starts; None where nothing says so."""
    if document_starts is None:
        return None
    return torch.arange(document_starts.shape[1], device=document_starts.device) - document_starts


class AttentionPositions(Protocol):
    """Positions that enter in attention, the same object for all blocks."""

    def __call__(self, x: Tensor, offset: int, positions: Tensor | None = None) -> Tensor:
        """Queries or keys [b, n, s, d] whose first position is ``offset`` -> the same with positions in them.

        positions [b, s], below s: of each token, in place of offset, offset + 1, ...
        """

    def table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of at least ``length`` positions, fp32 [length, r/2] each; r features turn, half-split."""


class Positions:
    """The base of the schemes a configuration can name. A builder returns None where there is nothing to add."""

    @classmethod
    def for_embedding(cls, model: Any, source: ParamFactory, init_fn: InitFn) -> nn.Module | None:
        """A module (length, offset, positions, device) -> [length, 1 or b, h], which is added to the word embeddings.

        positions: as in AttentionPositions, or None. model: the configuration's model section.
        """
        return None

    @classmethod
    def for_scores(cls, model: Any, source: ParamFactory, multipliers: Multipliers) -> nn.Module | None:
        """A module (length, device) -> [n/t, length]: added to the score of a query and a key 0, 1, ... places before.

        n/t: this rank's heads. All blocks share the module.
        """
        return None

    @classmethod
    def for_attention(cls, model: Any, head_dim: int, kernel: RotaryKernel) -> AttentionPositions | None:
        """What attention applies to queries and keys."""
        return None
