"""No positions: the causal mask alone gives the order (arXiv:2203.16634)."""

from megatron.model.positions.base import Positions


class NoPositions(Positions):
    """Adds nothing at the embedding and nothing in attention."""
