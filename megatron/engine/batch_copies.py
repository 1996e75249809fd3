"""Copies micro batches to the device, beside its computation."""

from __future__ import annotations

import torch

from megatron.data.dataset.batch import MicroBatch


class DeviceCopies:
    """Starts the copy of each micro batch on a stream of its own; on a CPU a batch stays as it is.

    The host does not wait, and is a step ahead of the device: the batches of a step are copied while the device works
    on the step before. They come from page-locked memory (data/dataset/loader.py), without which a copy would wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: MicroBatch) -> MicroBatch:
        """Returns the batch on the device; work issued from now on sees it complete."""
        if self._stream is None:
            return batch
        reader = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copied = batch.to(self._device, non_blocking=True)
        reader.wait_stream(self._stream)
        for tensor in copied.tensors():
            tensor.record_stream(reader)  # the allocator must not reuse it for a later copy while it is read
        return copied
