"""Memory of a device, and the peak of this process: of the device's allocator on a GPU, the resident set on a CPU."""

from __future__ import annotations

import os
import resource

import torch


def peak_memory_bytes(device: torch.device | str) -> int:
    """Returns the peak memory so far. On a GPU: tensors of this process; on a CPU: the process, Python included."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def total_memory_bytes(device: torch.device | str) -> int:
    """Returns the memory of the GPU, or of the host of a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
