"""Softmax over a vocabulary on the CPU by a compiled kernel (csrc/cross_entropy.cpp), in one pass over the memory.

The gradient of the target is computed in fp32 before it is rounded, and the logits may be overwritten with it.

Shapes: r rows (tokens), v vocabulary (of this rank, if it is sharded).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from megatron.kernels.cpp_build import library_unavailable, loaded_library
from megatron.kernels.cpp_call import pointer
from megatron.kernels.cpu_features import unreadable_memory


def cpp_softmax_unavailable(rows: Tensor) -> str | None:
    """Returns the reason why the compiled kernel cannot take logits [r, v], or None. May compile it."""
    unreadable = unreadable_memory(rows)
    if unreadable is not None:
        return f"The compiled softmax {unreadable}."
    if rows.shape[1] == 0 or rows.stride(1) != 1:
        return "The compiled softmax takes rows of neighbouring numbers."
    return library_unavailable()


def cpp_softmax(
    rows: Tensor,
    log_sums: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    scale: Tensor | None = None,
    hit: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns the log-sum-exp of each row, fp32 [r]; writes the gradient scale * softmax - hit * onehot(target).

    Args:
        rows: Logits [r, v].
        log_sums: The log-sum-exp of each row [r], if it is known.
        targets: Ids inside this vocabulary, int64 [r].
        scale: Factor of each row, fp32 [r].
        hit: What the target's gradient is less, fp32 [r].
        out: Takes the gradient [r, v], and may be the logits; None for no gradient.
    """
    loaded = loaded_library()
    count, columns = rows.shape
    sums = torch.empty(count, dtype=torch.float32) if log_sums is None else log_sums.contiguous()
    per_row = [None if each is None else each.contiguous() for each in (targets, scale, hit)]
    loaded.neox_softmax(
        int(rows.dtype == torch.bfloat16),
        pointer(rows),
        (ctypes.c_int64 * 4)(count, columns, rows.stride(0), 0 if out is None else out.stride(0)),
        pointer(None if log_sums is None else sums),
        pointer(sums),
        *map(pointer, per_row),
        pointer(out),
        torch.get_num_threads(),
    )
    if out is not None:
        torch.autograd.graph.increment_version(out)  # an operation that saved the logits for its gradient will raise
    return sums
