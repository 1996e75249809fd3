"""Causal attention of full sequences on the CPU by a compiled kernel, forward and backward (csrc/attention.cpp).

Blocks of queries and keys stay in the cache; scores, mask, bias, softmax and the product are one pass, and the backward
pass computes the weights of a block again from the logarithm of each row's sum, so that nothing of the size [s, s] is
kept (arXiv:2205.14135). Products are in fp32, or of pairs of bfloat16 where the CPU multiplies them, with fp32 sums.

Shapes: b micro batch, n query heads, m key/value heads (n = g * m), s positions, d head dim.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.kernels.attention_patterns import AttentionMask, Window
from megatron.kernels.cpp_build import library_unavailable, loaded_library
from megatron.kernels.cpp_call import pointer
from megatron.kernels.cpu_features import unreadable_memory

_MULTIPLE = 16
"""The head dim is a multiple of the numbers in a register."""


def cpp_attention_unavailable(q: Tensor, k: Tensor, view: AttentionMask | None = None) -> str | None:
    """Returns the reason why the compiled kernel cannot be used, or None. May compile it.

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, s, d].
        view: Mask besides the causal one, and a bias.
    """
    unreadable = unreadable_memory(q)
    if unreadable is not None:
        return f"The compiled attention {unreadable}."
    if q.shape[-1] % _MULTIPLE:
        return f"The compiled attention takes heads of a multiple of {_MULTIPLE} features, not {q.shape[-1]}."
    if view is not None and view.sinks is not None:
        return "The compiled attention has no sinks."
    if view is not None and not isinstance(view.pattern, Window | None):
        return "The compiled attention knows windows, and no other pattern."
    if k.shape[0] * k.shape[1] < torch.get_num_threads():
        return "The compiled attention gives a thread the query heads of one key/value head at least."
    return library_unavailable()


def cpp_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None, view: AttentionMask | None = None
) -> Tensor:
    """Causal attention of full sequences: q [b, n, s, d], k and v [b, m, s, d] -> [b, n, s, d].

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        starts: First key that each query may see [b, s], at most its own position and never decreasing; 0 unless set.
        view: A window, a bound of the scores, and a bias, which gets a gradient.
    """
    bias, bound = (None, None) if view is None else (view.bias, view.softcap)
    window = view.pattern.width if view is not None and isinstance(view.pattern, Window) else None
    out: Tensor = _CppAttention.apply(q, k, v, bias, _first(q, starts, window), bound)
    return out


def _first(q: Tensor, starts: Tensor | None, window: int | None) -> Tensor | None:
    """Returns the first key that each query sees, int32 [b, s], or None if that is 0 for all."""
    if window is None:
        return None if starts is None else starts.to(torch.int32).contiguous()
    inside = (torch.arange(q.shape[2], dtype=torch.int32) - (window - 1)).clamp_(min=0).expand(len(q), -1)
    return (inside if starts is None else torch.maximum(inside, starts.to(torch.int32))).contiguous()


def _rows(x: Tensor) -> Tensor:
    """Returns the tensor with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(like: Tensor) -> Tensor:
    """Returns a tensor [b, n, s, d] in the order [s, b, n, d], in which the next layer reads it."""
    batch, heads, length, size = like.shape
    return torch.empty(length, batch, heads, size, dtype=like.dtype).permute(1, 2, 0, 3)


class _Call:
    """The arguments that both directions share, as C takes them.

    Args:
        q: Queries.
        k: Keys.
        bias: By distance, or none.
        first: First key of each query, or none.
        earlier: True if all keys are before all queries.
        bound: Of scores, or none.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        bias: Tensor | None,
        first: Tensor | None,
        *,
        earlier: bool = False,
        bound: float | None = None,
    ) -> None:
        self.library = loaded_library()
        batch, heads, length, size = q.shape
        self.half = int(q.dtype == torch.bfloat16)
        keys, shift = k.shape[2], k.shape[2] if earlier else 0
        self.sizes = (ctypes.c_int64 * 7)(batch, heads, k.shape[1], length, size, keys, shift)
        self.scale, self.bound = ctypes.c_float(1 / math.sqrt(size)), ctypes.c_float(bound or 0.0)
        self.masks = (pointer(first), pointer(bias))

    def __call__(self, function: Any, tensors: Sequence[Tensor], sums: Tensor, *further: ctypes.c_void_p) -> None:
        """Calls a direction with the tensors and their strides by batch, head and position [elements]."""
        pointers = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
        strides = (ctypes.c_int64 * (3 * len(tensors)))(*(stride for x in tensors for stride in x.stride()[:3]))
        fixed = (self.half, pointers, pointer(sums), self.sizes, strides, self.scale, self.bound, *self.masks)
        function(*fixed, *further, torch.get_num_threads())


class _CppAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, first: Tensor | None, bound: float | None
    ) -> Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        table = None if bias is None else bias[:, : q.shape[2]].float().contiguous()  # [n, s]
        out, sums = _empty(q), torch.empty(q.shape[:3], dtype=torch.float32)
        call = _Call(q, k, table, first, bound=bound)
        call(call.library.neox_attention, (q, k, v, out), sums)
        ctx.save_for_backward(q, k, v, out, sums, table, first)
        ctx.bound = bound
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        q, k, v, out, sums, table, first = ctx.saved_tensors
        grad_q, grad_k, grad_v = _empty(q), _empty(k), _empty(v)
        by_distance = torch.zeros(q.shape[:3], dtype=torch.float32) if ctx.needs_input_grad[3] else None
        call = _Call(q, k, table, first, bound=ctx.bound)
        tensors = (q, k, v, out, _rows(grads[0]), grad_q, grad_k, grad_v)
        call(call.library.neox_attention_backward, tensors, sums, pointer(by_distance))
        bias = None if by_distance is None else _of_bias(by_distance, *ctx.bias)
        return grad_q, grad_k, grad_v, bias, None, None


def _of_bias(by_distance: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns the gradient of the bias [n, distances], of that of each row of the batch [b, n, s]."""
    total = by_distance.sum(0)
    grad = total.new_zeros(shape)
    grad[:, : total.shape[1]] = total
    return grad.to(dtype)


def cpp_block_forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, *, own: bool) -> tuple[Tensor, Tensor]:
    """Returns the attention to a block of keys [b, n, s, d], and the logarithm of each row's sum, fp32 [b, n, s].

    A query that sees no key has a result of 0, and -inf for the logarithm.

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, k, d].
        v: Values [b, m, k, d].
        first: First key of the block that each query sees, int32 [b, s], never decreasing, or None for all.
        own: True if the keys are of the queries' own positions, in the same order; else every query sees the last key.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    out, sums = _empty(q), torch.empty(q.shape[:3], dtype=torch.float32)
    call = _Call(q, k, None, first, earlier=not own)
    call(call.library.neox_attention, (q, k, v, out), sums)
    return out, sums.mul_(math.log(2))


def cpp_block_backward(
    forward: tuple[Tensor, Tensor, Tensor], k: Tensor, v: Tensor, grad: Tensor, first: Tensor | None, *, own: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of queries, keys and values that a block of keys contributes.

    Args:
        forward: Queries, the result, both [b, n, s, d], and the logarithm of each row's sum, fp32 [b, n, s], both over
            all blocks.
        k: Keys of the block [b, m, k, d].
        v: Values of the block [b, m, k, d].
        grad: Gradient of the result [b, n, s, d].
        first: As in ``cpp_block_forward``.
        own: As in ``cpp_block_forward``.
    """
    q, out, sums = forward
    tensors = [_rows(x) for x in (q, k, v, out, grad)]
    found = _empty(q), _empty(k), _empty(v)
    call = _Call(tensors[0], tensors[1], None, first, earlier=not own)
    call(call.library.neox_attention_backward, (*tensors, *found), sums / math.log(2), pointer(None))
    return found
