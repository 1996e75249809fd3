"""Softmax over a vocabulary in blocks, for cross entropy.

With a vocabulary of 50,304 the logits are by far the largest tensor of a step. Each block of rows is small enough to
stay in the CPU's cache while its maximum, its sum and its gradient are computed in fp32, so the logits are read once
and never copied to fp32. On a CPU a compiled loop takes the rows one by one.
Reference: torch.nn.functional.cross_entropy.

Shapes: r rows (tokens), v vocabulary (of this rank, if it is sharded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.cpp_cross_entropy import cpp_softmax, cpp_softmax_unavailable

BLOCK_ELEMENTS = 1 << 20
"""fp32 elements of one block: 4 MiB."""


@dataclass(frozen=True)
class GradientSpec:
    """Terms of the gradient scale * softmax - hit * onehot(target) of each row, and its destination."""

    targets: Tensor
    """Ids inside this vocabulary [r]."""
    scale: Tensor
    """[r] fp32."""
    hit: Tensor
    """[r] fp32."""
    out: Tensor
    """[r, v]; may be the logits themselves."""


SoftmaxPass = Callable[[Tensor, GradientSpec | None, Tensor | None], Tensor]
"""(logits [r, v], terms of the gradient or None, known log-sum-exp [r] or None) -> log-sum-exp of each row [r]."""


def softmax_pass(rows: Tensor, spec: GradientSpec | None = None, log_sums: Tensor | None = None) -> Tensor:
    """Returns the log-sum-exp of each row, fp32 [r]; writes the gradient if there is a spec.

    log_sums: spares the compiled kernel a pass over the rows; in torch a block of rows is in the cache anyway.
    """
    if cpp_softmax_unavailable(rows) is None:
        terms = {} if spec is None else vars(spec)
        return cpp_softmax(rows, log_sums, **terms)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    found = rows.new_empty(rows.shape[0], dtype=dtype)
    for block in _blocks(rows):
        logits = rows[block]
        probabilities = torch.softmax(logits, dim=1, dtype=dtype)
        # The largest probability is 1 / sum(exp(logit - largest logit)).
        found[block] = logits.amax(dim=1) - probabilities.amax(dim=1).log_()
        if spec is not None:
            probabilities.mul_(spec.scale[block].unsqueeze(1))
            probabilities.scatter_add_(1, spec.targets[block].unsqueeze(1), -spec.hit[block].unsqueeze(1))
            spec.out[block] = probabilities
    return found


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Yields row ranges of about BLOCK_ELEMENTS elements; on an accelerator a few large ones, to launch few kernels."""
    limit = BLOCK_ELEMENTS if rows.device.type == "cpu" else 64 * BLOCK_ELEMENTS
    step = max(1, limit // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield slice(start, min(start + step, rows.shape[0]))


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Reference: -log p(target) of logits [..., v] and ids [...] by torch.nn.functional.cross_entropy, fp32."""
    flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), reduction="none")
    return flat.view(targets.shape)
