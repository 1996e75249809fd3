"""The launch of Triton kernels: the one place that starts one, and the sizes of blocks and grids.

Triton's interpreter (TRITON_INTERPRET=1) runs the same kernels on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

MAX_COLUMNS = 65_536
"""Columns that one program of a row-wise kernel holds in its registers."""
_CPU_PROGRAMS = 3  # in the interpreter: more than one, so that rows are distributed
_PROGRAMS_PER_MULTIPROCESSOR = 2


def launch(kernel: Any, grid: Sequence[int], *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """Starts a kernel on the device of its first tensor; a grid without programs starts nothing.

    Args:
        kernel: A function decorated with triton.jit.
        grid: Number of programs along each axis.
        args: Tensors and numbers.
        num_warps: Warps of a program.
        constants: Arguments that are known when the kernel is compiled.
    """
    if 0 in grid:
        return
    first = next(each for each in args if isinstance(each, Tensor))
    with torch.cuda.device(first.device) if first.device.type == "cuda" else nullcontext():
        kernel[tuple(grid)](*args, num_warps=num_warps, **constants)


def next_power_of_2(count: int) -> int:
    """The smallest power of 2 that is not below count."""
    return 1 << max(0, count - 1).bit_length()


def warps_for(block: int) -> int:
    """Warps of a program that holds a row of `block` elements: 16 elements or more a thread, at most 16 warps."""
    return min(16, max(1, block // 512))


def cdiv(count: int, block: int) -> int:
    """Blocks that cover `count` elements."""
    return -(-count // block)


def persistent_programs(device: torch.device, rows: int) -> int:
    """Programs of a kernel in which each one loops over rows and sums over them."""
    limit = _CPU_PROGRAMS
    if device.type == "cuda":
        limit = _PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(limit, rows))


def as_rows(x: Tensor) -> Tensor:
    """[..., h] -> [r, h] with contiguous rows; a copy only where the layout asks for one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 and rows.stride(0) == rows.shape[1] else rows.contiguous()
