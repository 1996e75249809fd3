"""What a position scheme is: something at the embedding, something in attention, or neither."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from megatron.kernels.rotary import RotaryKernel
from megatron.parallel.initialization import Fill, ParameterSource


class AttentionPositions(Protocol):
    """Positions that enter in attention, the same object for all blocks."""

    def __call__(self, x: Tensor, offset: int) -> Tensor:
        """Queries or keys [b, n, s, d] whose first position is ``offset`` -> the same with positions in them."""


class Positions:
    """The base of the schemes a configuration can name. Both builders return None where there is nothing to add."""

    @classmethod
    def for_embedding(cls, model: Any, source: ParameterSource, fill: Fill) -> nn.Module | None:
        """A module (length, offset) -> [length, 1, h] whose result is added to the word embeddings.

        model: the configuration's model section.
        """
        return None

    @classmethod
    def for_attention(cls, model: Any, head_dim: int, kernel: RotaryKernel) -> AttentionPositions | None:
        """What attention applies to queries and keys."""
        return None
