"""A micro-batch: what one forward pass of one rank reads. Made here once, for every engine.

Shapes: b micro batch, s sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron.data.dataset.document_starts import document_starts
from megatron.kernels.documents import DocumentOffsets, attach_offsets, attached_tensors, offsets_of


@dataclass(frozen=True)
class MicroBatch:
    """The inputs and targets of one pass."""

    tokens: Tensor
    """int64 [b, s]."""
    labels: Tensor
    """int64 [b, s], the tokens one position further on; the masked tokens of a masked language model."""
    loss_mask: Tensor
    """float32 [b, s], 0 where a label does not count; the label is the next token there too."""
    document_starts: Tensor | None = None
    """int64 [b, s], the position at which the document of each token starts; given where attention or positions are
    reset there.
    """
    rewards: Tensor | None = None
    """float32 [b, s], that of the document of each token, where there is reward data."""
    padding: Tensor | None = None
    """bool [b, s], True behind the last document of a sample that is not full; given where experts are to know it."""

    token_types: Tensor | None = None
    """int64 [b, s], the segment of each token, where the model has embeddings of them."""
    sentence_order: Tensor | None = None
    """int64 [b, 1], 1 where the two segments of a sample are swapped, where that is learned."""

    @property
    def inputs(self) -> Tensor:
        """What the first layer reads: tokens [b, s], or [2, b, s] with their types behind them where it has them."""
        return self.tokens if self.token_types is None else torch.stack((self.tokens, self.token_types))

    @property
    def order(self) -> tuple[Tensor, ...]:
        """The order of segments, or ()."""
        return () if self.sentence_order is None else (self.sentence_order,)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MicroBatch:
        """The batch on a device.

        Where the documents lie is read before the copy to a GPU, so that attention does not wait for it there.
        """
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        here, there = self.document_starts, moved.document_starts
        if here is not None and there is not None and here.device.type == "cpu" != there.device.type:
            offsets = offsets_of(here) if attached_tensors(here) else DocumentOffsets.of(here)
            offsets = offsets.pin_memory() if here.is_pinned() else offsets
            attach_offsets(there, offsets.to(device, non_blocking=non_blocking))
        return moved

    def pin_memory(self) -> MicroBatch:
        """The batch in page-locked memory, from where a copy to a GPU runs beside computation."""
        return self._each(Tensor.pin_memory)

    def first(self, length: int) -> MicroBatch:
        """The first tokens of every sequence."""
        return self._each(lambda tensor: tensor[:, :length].contiguous())

    def behind(self, prompt: int) -> MicroBatch:
        """The same behind so many places for the vectors of a learned prompt, where no label counts.

        ValueError where documents are kept apart: only the first of a sequence would see the prompt.
        """
        if self.document_starts is not None:
            raise ValueError("documents that are kept apart do not share a prompt")
        return self._each(lambda tensor: torch.nn.functional.pad(tensor, (prompt, 0)))

    def tensors(self) -> list[Tensor]:
        """The tensors that are given, and those that are attached to them."""
        given = [value for field in fields(self) if (value := getattr(self, field.name)) is not None]
        return given if self.document_starts is None else [*given, *attached_tensors(self.document_starts)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        values = (getattr(self, field.name) for field in fields(self))
        return MicroBatch(*(None if value is None else change(value) for value in values))  # type: ignore[arg-type]


def make_batch(
    samples: Tensor,
    *,
    eod: int,
    eod_mask_loss: bool,
    labels: Tensor | None = None,
    borders: Tensor | None = None,
    rewards: Tensor | None = None,
    padding: Tensor | None = None,
    apart: bool = True,
    prompt: int = 0,
) -> MicroBatch:
    """The micro-batch of some samples, int64 [b, s + 1].

    Args:
        samples: Tokens of the samples, [b, s + 1].
        eod: The id that ends a document.
        eod_mask_loss: Positions whose input token ends a document do not count; their label is the first token of
            another document, which nothing announces. With labels these are the positions before a border.
        labels: int64 [b, s + 1], the samples with IGNORE_INDEX where a token is not to be predicted; the samples
            themselves unless given.
        borders: Bool [b, s + 1], True where a document starts. With labels an eod is no border: in a conversation it
            may end every turn.
        apart: Documents stay apart where borders are given, those that an eod ends inside one included.
        rewards: float32 [b, s + 1].
        padding: Bool [b, s + 1], True for tokens that are no document's.
        prompt: Places before every sequence for the vectors of a learned prompt, where no label counts; the batch is
            [b, prompt + s].
    """
    tokens = samples[:, :-1].contiguous()  # [b, s]
    targets = (samples if labels is None else labels)[:, 1:].contiguous()  # [b, s]
    loss_mask = torch.ones(tokens.shape, dtype=torch.float32)
    if eod_mask_loss:
        if labels is not None and borders is None:
            raise ValueError("with labels the borders say where a document ends")
        counts = tokens != eod if labels is None or borders is None else ~borders[:, 1:]
        loss_mask = counts.to(torch.float32)
    if labels is not None:
        counted = targets >= 0
        loss_mask *= counted
        targets = targets.where(counted, samples[:, 1:])  # modules of multi-token prediction read them as tokens
    ends = eod if labels is None else None
    batch = MicroBatch(
        tokens,
        targets,
        loss_mask,
        document_starts=document_starts(tokens, borders[:, :-1], ends) if apart and borders is not None else None,
        rewards=None if rewards is None else rewards[:, :-1].contiguous(),
        padding=None if padding is None else padding[:, :-1].contiguous(),
    )
    return batch.behind(prompt) if prompt else batch
