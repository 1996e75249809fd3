"""Softmax over a vocabulary in one pass over the logits, for cross entropy.

The plain implementation, whose interface this has, is in `megatron/kernels/cross_entropy.py`. A row is read in blocks
of columns: once for its log-sum-exp (largest value and sum together), once more where a gradient is written.

Shapes: r rows (tokens), v vocabulary (of this rank, if it is sharded).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.cross_entropy import GradientSpec
from megatron.kernels.triton import runtime

_BLOCK = 4096


@triton.jit
def log_sum_exp(logits, log_sums, columns, stride, BLOCK: tl.constexpr):
    """One program a row: log(sum(exp(row)))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + column < columns
        value = tl.load(logits + row * stride + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, value)
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - reference) + tl.exp(value - reference)
        largest = higher
    row_largest = tl.max(largest, axis=0)
    reference = tl.where(row_largest == float("-inf"), 0.0, row_largest)
    row_total = tl.sum(total * tl.exp(largest - reference), axis=0)
    tl.store(log_sums + row, reference + tl.log(row_total))


@triton.jit
def softmax_gradient(logits, log_sums, targets, scale, hit, out, columns, stride, out_stride, BLOCK: tl.constexpr):
    """One program a block of columns of a row: scale * softmax - hit * onehot(target). out may be the logits."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(logits + row * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    gradient = tl.load(scale + row) * tl.exp(value - tl.load(log_sums + row))
    gradient = gradient - tl.where(column == tl.load(targets + row), tl.load(hit + row), 0.0)
    tl.store(out + row * out_stride + column, gradient.to(out.dtype.element_ty), mask=inside)


def softmax_pass(rows: Tensor, spec: GradientSpec | None = None, log_sums: Tensor | None = None) -> Tensor:
    """Returns the log-sum-exp of each row, fp32 [r]; writes the gradient if there is a spec.

    Args:
        rows: Logits [r, v]; the elements of a row are adjacent.
        spec: Terms and destination of the gradient.
        log_sums: The log-sum-exp of each row where it is known, which saves a pass.
    """
    count, columns = rows.shape
    block = min(_BLOCK, runtime.next_power_of_2(columns))
    if log_sums is None:
        log_sums = torch.empty(count, dtype=torch.float32, device=rows.device)
        runtime.launch(log_sum_exp, (count,), rows, log_sums, columns, rows.stride(0), BLOCK=block, num_warps=8)
    if spec is not None:
        runtime.launch(
            softmax_gradient, (count, runtime.cdiv(columns, block)), rows, log_sums, spec.targets, spec.scale,
            spec.hit, spec.out, columns, rows.stride(0), spec.out.stride(0), BLOCK=block, num_warps=8,
        )  # fmt: skip
    return log_sums
