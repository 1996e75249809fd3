"""Peak memory of this process [bytes]: of the device's allocator on a GPU, of the resident set on a CPU."""

from __future__ import annotations

import resource

import torch


def peak_memory_bytes(device: torch.device | str) -> int:
    """Returns the peak memory so far. On a GPU: tensors of this process; on a CPU: the process, Python included."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
