"""Rotary positions: rotates pairs of features by an angle that grows with the position (arXiv:2104.09864).

Feature i of the first half is paired with feature i of the second half of the rotated features ("half-split"); the
remaining features are unchanged. On a CPU a compiled loop (csrc/rotary.cpp) does it in one pass.

Shapes: s sequence, b micro batch, n heads, d head dim, r rotated features (even, at most d).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.kernels.cpp_build import library
from megatron.kernels.cpp_call import pointer
from megatron.kernels.cpu_features import unreadable_memory

RotaryPair = Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor | None], tuple[Tensor, Tensor]]
"""(q [b, n, s, d], k [b, m, s, d], cos and sin [positions, r/2], offset, positions [b, s] or None) -> rotated q, k."""
RotaryKernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [b, n, s, d], cos and sin [s, r/2], or [b, 1, s, r/2] by sequence) -> the rotated x [b, n, s, d]."""


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Reference implementation, as in the paper."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def rotary_pair(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int = 0, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the rotated queries [b, n, s, d] and keys [b, m, s, d].

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, s, d].
        cos: Cosines of the angles of positions, fp32 [positions, r/2].
        sin: Sines likewise.
        offset: Position of the first token.
        positions: Position of each token instead, int64 [b, s].
    """
    if positions is not None:
        cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)  # [b, 1, s, r/2]
    else:
        cos, sin = (table[offset : offset + q.shape[2]] for table in (cos, sin))
    return rotary(q, cos, sin), rotary(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Returns the rotated x, contiguous. back: by the opposite angle, which is the inverse."""
    compiled = _library(x)
    if compiled is not None:
        return _turn_at_once(compiled, x, cos, sin, back=back)
    sin = -sin if back else sin
    half = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = x[..., :half], x[..., half : 2 * half]
    out[..., :half] = torch.addcmul(first * cos, second, sin, value=-1)
    out[..., half : 2 * half] = torch.addcmul(second * cos, first, sin)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


def _library(x: Tensor) -> ctypes.CDLL | None:
    """The compiled kernels, where they can take the tensor: fp32 and bfloat16 in the memory of a CPU."""
    if unreadable_memory(x) is not None:
        return None
    found = library()
    return None if isinstance(found, str) else found


def _turn_at_once(compiled: ctypes.CDLL, x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """The same in one pass over the memory."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    batch, heads, length, size = x.shape
    half = cos.shape[-1]
    by_sequence = cos.dim() == 4 and cos.shape[0] > 1
    out = torch.empty(x.shape, dtype=x.dtype)
    compiled.neox_rotary(
        int(x.dtype == torch.bfloat16),
        pointer(x),
        pointer(out),
        (ctypes.c_int64 * 5)(batch, heads, length, size, half),
        (ctypes.c_int64 * 4)(*x.stride()[:3], length * half if by_sequence else 0),
        pointer(cos),
        pointer(sin),
        ctypes.c_float(-1.0 if back else 1.0),
        torch.get_num_threads(),
    )
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, back=True), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns the rotated x, contiguous, without the intermediate tensors that autograd would save."""
    if not torch.is_grad_enabled():
        return _turn(x, cos, sin)
    return _Rotary.apply(x, cos, sin)
