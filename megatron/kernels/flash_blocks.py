"""Blocks of keys by torch's flash attention on GPUs, which gives the logarithm of each row's sum and takes it back.

Shapes: b micro batch, n query heads, m key/value heads, s queries, k keys, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEATURES = 8
"""The head dim is a multiple of it."""
LARGEST_HEAD = 256
CAPABILITY = (8, 0)


def flash_takes(q: Tensor) -> bool:
    """Returns whether flash attention takes queries [b, n, s, d]: half precision, on a GPU since Ampere."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % FEATURES == 0
        and q.shape[-1] <= LARGEST_HEAD
        and torch.cuda.get_device_capability(q.device) >= CAPABILITY
    )


def flash_block_forward(q: Tensor, k: Tensor, v: Tensor, *, own: bool) -> tuple[Tensor, Tensor]:
    """Returns the attention to a block of keys [b, n, s, d], and the logarithm of each row's sum, fp32 [b, n, s].

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, k, d].
        v: Values [b, m, k, d].
        own: True if the keys are of the queries' own positions, under the causal mask; else every query sees all.
    """
    k, v = _for_heads(k, q), _for_heads(v, q)
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, own)
    return found[0], found[1]


def flash_block_backward(
    forward: tuple[Tensor, Tensor, Tensor], k: Tensor, v: Tensor, grad: Tensor, *, own: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of queries, keys and values that a block of keys contributes.

    Args:
        forward: Queries, the result, both [b, n, s, d], and the logarithm of each row's sum, fp32 [b, n, s], both over
            all blocks.
        k: Keys of the block [b, m, k, d].
        v: Values of the block [b, m, k, d].
        grad: Gradient of the result [b, n, s, d].
        own: As in ``flash_block_forward``.
    """
    q, out, sums = forward
    drawn = torch.empty(2, dtype=torch.uint64, device=q.device)  # state of a generator, which only dropout reads
    lengths = None, None, q.shape[2], k.shape[2]
    grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, _for_heads(k, q), _for_heads(v, q), out, sums.contiguous(), *lengths, 0.0, own, drawn, drawn
    )
    return grad_q, _of_group(grad_k, k), _of_group(grad_v, v)


def _for_heads(x: Tensor, q: Tensor) -> Tensor:
    """Repeats keys or values for each query head that reads them: [b, m, k, d] -> [b, n, k, d]."""
    group = q.shape[1] // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _of_group(grad: Tensor, x: Tensor) -> Tensor:
    """Sums the gradients of repeated keys or values: [b, n, k, d] -> [b, m, k, d]."""
    return grad if grad.shape[1] == x.shape[1] else grad.unflatten(1, (x.shape[1], -1)).sum(2)
