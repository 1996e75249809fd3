"""Leaves padding out of the products of an encoder on a CPU.

Shapes: s sequence, b micro batch, r tokens that are not padding; other dimensions are free.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron.distributed.mesh import Axis


@dataclass(frozen=True)
class RealTokens:
    """The tokens of a batch that are not padding."""

    rows: Tensor
    """Their places in the flattened [s, b], int64 [r]."""
    length: int
    """s [tokens]."""
    batch: int
    """b [samples]."""

    @staticmethod
    def of(real: Tensor | None, axis: Axis) -> RealTokens | None:
        """Returns those of a batch; None where all tokens are computed: without padding, and where it would cost more.

        On a GPU the host would wait for their number, and with sequence parallelism ranks would have different ones.

        Args:
            real: True for a token that is not padding, bool [b, s]; None without padding.
            axis: Tensor-parallel ranks.
        """
        if real is None or real.device.type != "cpu" or axis.sequence_parallel:
            return None
        rows = real.t().flatten().nonzero().flatten()
        return None if len(rows) == real.numel() else RealTokens(rows, real.shape[1], real.shape[0])

    def pack(self, x: Tensor) -> Tensor:
        """[s, b, ...] -> [r, 1, ...]."""
        return x.flatten(0, 1).index_select(0, self.rows).unsqueeze(1)

    def unpack(self, packed: Tensor) -> Tensor:
        """[r, 1, ...] -> [s, b, ...], with 0 for padding."""
        full = packed.new_zeros(self.length * self.batch, *packed.shape[2:])
        return full.index_copy(0, self.rows, packed.squeeze(1)).unflatten(0, (self.length, self.batch))
