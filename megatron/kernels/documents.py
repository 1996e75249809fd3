"""Where the documents of a batch lie when its rows follow each other in one sequence, for kernels without a mask.

`starts` [b, s] says for each token where its document starts (`data/dataset/document_starts.py`). Packages want the
position of the first token of every document in the joined rows, and the length of the longest one, which decide the
size of a launch. On a GPU the host would wait for both. So they are taken from the batch before it is copied to the
device, once a batch, and attached to the copy; only a copy without them (a later stage of a pipeline) waits.

Shapes: b micro batch, s positions, c documents of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ATTRIBUTE = "neox_document_offsets"


@dataclass(frozen=True)
class DocumentOffsets:
    """The documents of a batch."""

    offsets: Tensor
    """int32 [c + 1]: the first token of each document in the joined rows, and their end."""
    longest: int
    """A length that no document exceeds [tokens]."""

    @staticmethod
    def of(starts: Tensor) -> DocumentOffsets:
        """Returns those of a batch. On a GPU the host waits. starts: [b, s]."""
        batch, length = starts.shape
        first = starts == torch.arange(length, device=starts.device)
        offsets = first.flatten().nonzero().flatten()
        end = torch.full((1,), batch * length, device=starts.device)
        offsets = torch.cat([offsets, end]).to(torch.int32)
        return DocumentOffsets(offsets, int(offsets.diff().max()) if len(offsets) > 1 else 0)

    @staticmethod
    def of_rows(batch: int, length: int, device: torch.device) -> DocumentOffsets:
        """Returns those of rows of one document each.

        Args:
            batch: Number of rows.
            length: Length of a row [tokens].
            device: Device of the offsets.
        """
        return DocumentOffsets(torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device), length)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> DocumentOffsets:
        """Returns those with offsets on a device."""
        return replace(self, offsets=self.offsets.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> DocumentOffsets:
        """Returns those with offsets in page-locked memory, from where a copy to a GPU does not wait."""
        return replace(self, offsets=self.offsets.pin_memory())


def attach_offsets(starts: Tensor, offsets: DocumentOffsets) -> None:
    """Attaches the offsets, which are on the same device, to the starts of a batch [b, s]."""
    setattr(starts, ATTRIBUTE, offsets)


def attached_tensors(starts: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors attached to the starts [b, s], which live as long as they do."""
    found = getattr(starts, ATTRIBUTE, None)
    return () if found is None else (found.offsets,)


def offsets_of(starts: Tensor) -> DocumentOffsets:
    """Returns what is attached to the starts [b, s]; computed and attached where nothing is."""
    found = getattr(starts, ATTRIBUTE, None)
    if found is None:
        found = DocumentOffsets.of(starts)
        attach_offsets(starts, found)
    return found
