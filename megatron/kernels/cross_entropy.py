"""Cross entropy that reads the logits twice and never holds a second fp32 copy of them.

With a vocabulary of 50,304 the logits are by far the largest tensor of a step. The forward pass keeps only one number a
row (the logarithm of the sum of exponentials); the backward pass writes the gradient directly, block by block in fp32,
with blocks that fit in the processor's cache. Twin: torch.nn.functional.cross_entropy.

Shapes: r rows (tokens), v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20
"""fp32 elements of one block: 4 MiB."""


def _blocks(values: Tensor) -> Iterator[slice]:
    """Row ranges of about BLOCK_ELEMENTS elements; on an accelerator a few large ones, to keep launches few."""
    rows, width = values.shape
    limit = BLOCK_ELEMENTS if values.device.type == "cpu" else 64 * BLOCK_ELEMENTS
    step = max(1, limit // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def row_statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [r, v] -> the largest of each row [r] and the sum of exp(logit - largest) [r], in fp32."""
    largest = rows.new_empty(rows.shape[0], dtype=torch.float32)
    total = torch.empty_like(largest)
    for block in _blocks(rows):
        values = rows[block].float()
        top = torch.amax(values, dim=1, keepdim=True)
        largest[block] = top.squeeze(1)
        total[block] = (values - top).exp_().sum(dim=1)
    return largest, total


def softmax_gradient(rows: Tensor, log_sum: Tensor, targets: Tensor, scale: Tensor, hit: Tensor) -> Tensor:
    """The gradient scale * softmax - hit * onehot(target) of logits [r, v], in their own type."""
    gradient = torch.empty_like(rows)
    for block in _blocks(rows):
        values = rows[block] - log_sum[block].unsqueeze(1)  # a type wider than bf16: log_sum is fp32
        values.exp_().mul_(scale[block].unsqueeze(1))
        values.scatter_add_(1, targets[block].unsqueeze(1), -hit[block].unsqueeze(1))
        gradient[block] = values
    return gradient


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        rows, ids = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        largest, total = row_statistics(rows)
        log_sum = largest + torch.log(total)
        ctx.save_for_backward(rows, log_sum, ids)
        ctx.shape = logits.shape
        return (log_sum - rows.gather(1, ids.unsqueeze(1)).squeeze(1).float()).view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows, log_sum, ids = ctx.saved_tensors
        scale = grads[0].reshape(-1).float()
        return softmax_gradient(rows, log_sum, ids, scale, hit=scale).view(ctx.shape), None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of logits [..., v] of any float type and token ids [...], as fp32 [...]."""
    return _CrossEntropy.apply(logits, targets)


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The twin: the same through torch.nn.functional.cross_entropy."""
    flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), reduction="none")
    return flat.view(targets.shape)
