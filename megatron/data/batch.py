"""A micro-batch: what one forward pass of one rank reads. Made here once, for every engine.

Shapes: b micro batch, s sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MicroBatch:
    """The inputs and targets of one pass.

    tokens and labels: int64 [b, s], labels being the tokens one place further on. loss_mask: float32 [b, s], 0 where a
    label does not count.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MicroBatch:
        """The batch on a device."""
        return MicroBatch(
            self.tokens.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.loss_mask.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> MicroBatch:
        """The batch in page-locked memory, from where a copy to a GPU runs beside computation."""
        return MicroBatch(self.tokens.pin_memory(), self.labels.pin_memory(), self.loss_mask.pin_memory())


def make_batch(samples: torch.Tensor, *, eod: int, eod_mask_loss: bool) -> MicroBatch:
    """The micro-batch of some samples, int64 [b, s + 1].

    eod_mask_loss: positions whose input token ends a document do not count; their label is the first token of another
    document, which nothing announces.
    """
    tokens = samples[:, :-1].contiguous()  # [b, s]
    labels = samples[:, 1:].contiguous()  # [b, s]
    if eod_mask_loss:
        loss_mask = (tokens != eod).to(torch.float32)
    else:
        loss_mask = torch.ones(tokens.shape, dtype=torch.float32)
    return MicroBatch(tokens, labels, loss_mask)
