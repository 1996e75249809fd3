"""The softmax over a vocabulary, block by block, for cross entropy.

With a vocabulary of 50,304 the logits are by far the largest tensor of a step. Each block of rows here is small enough
to stay in the processor's cache while its maximum, its sum and its gradient are taken in fp32, so the logits are read
once and no fp32 copy of them is ever held. Twin: torch.nn.functional.cross_entropy.

Shapes: r rows (tokens), v vocabulary (of this rank, where it is cut).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20
"""fp32 elements of one block: 4 MiB."""


@dataclass(frozen=True)
class GradientSpec:
    """What the gradient scale * softmax - hit * onehot(target) of each row is made of, and where it goes.

    targets [r] ids inside this vocabulary; scale and hit [r] fp32; out [r, v] may be the logits themselves.
    """

    targets: Tensor
    scale: Tensor
    hit: Tensor
    out: Tensor


def softmax_pass(rows: Tensor, spec: GradientSpec | None = None) -> Tensor:
    """The logarithm of the sum of exponentials of each row: logits [r, v] -> fp32 [r], and the gradient if wanted."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    log_sums = rows.new_empty(rows.shape[0], dtype=dtype)
    for block in _blocks(rows):
        logits = rows[block]
        probabilities = torch.softmax(logits, dim=1, dtype=dtype)
        # The largest probability is 1 / sum(exp(logit - largest logit)).
        log_sums[block] = logits.amax(dim=1) - probabilities.amax(dim=1).log_()
        if spec is not None:
            probabilities.mul_(spec.scale[block].unsqueeze(1))
            probabilities.scatter_add_(1, spec.targets[block].unsqueeze(1), -spec.hit[block].unsqueeze(1))
            spec.out[block] = probabilities
    return log_sums


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Row ranges of about BLOCK_ELEMENTS elements; on an accelerator a few large ones, to keep launches few."""
    limit = BLOCK_ELEMENTS if rows.device.type == "cpu" else 64 * BLOCK_ELEMENTS
    step = max(1, limit // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield slice(start, min(start + step, rows.shape[0]))


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The twin: -log p(target) of logits [..., v] and ids [...] through torch.nn.functional.cross_entropy, fp32."""
    flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), reduction="none")
    return flat.view(targets.shape)
