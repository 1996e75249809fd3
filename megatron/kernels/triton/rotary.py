"""Rotary positions of queries and keys in one launch.

The plain implementation is in `megatron/kernels/rotary.py`. The backward pass is the rotation by the opposite angle.

Shapes: b micro batch, s sequence, n query heads, m key heads, d head dim, r rotated features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.triton import runtime

_ELEMENTS = 2048  # of the rotated halves of the heads of one program


@triton.jit
def rotate(
    q, k, q_out, k_out, cos, sin, positions, offset, length, q_heads, k_heads, half, rest,
    q_batch, q_head, q_row, k_batch, k_head, k_row, qo_batch, qo_head, qo_row, ko_batch, ko_head, ko_row,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, GIVEN: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """One program a token and a few heads, of which the first are queries and the others keys."""
    token = tl.program_id(0).to(tl.int64)
    batch, row = token // length, token % length
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    position = offset + row
    if GIVEN:
        position = tl.load(positions + token)
    within = pair < half
    c = tl.load(cos + position * half + pair, mask=within, other=0.0).to(tl.float32)
    s = tl.load(sin + position * half + pair, mask=within, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    first, second = pair, pair + half
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    is_q, is_k = (head < q_heads), (head >= q_heads) & (head < q_heads + k_heads)
    key = head - q_heads
    from_q, from_k = q + batch * q_batch + head * q_head + row * q_row, k + batch * k_batch + key * k_head + row * k_row
    to_q = q_out + batch * qo_batch + head * qo_head + row * qo_row
    to_k = k_out + batch * ko_batch + key * ko_head + row * ko_row
    mask_q, mask_k = is_q & within, is_k & within
    a = tl.load(from_q + first, mask=mask_q, other=0.0).to(tl.float32)
    a += tl.load(from_k + first, mask=mask_k, other=0.0).to(tl.float32)
    b = tl.load(from_q + second, mask=mask_q, other=0.0).to(tl.float32)
    b += tl.load(from_k + second, mask=mask_k, other=0.0).to(tl.float32)
    turned_a, turned_b = a * c - b * s, b * c + a * s
    tl.store(to_q + first, turned_a.to(q_out.dtype.element_ty), mask=mask_q)
    tl.store(to_q + second, turned_b.to(q_out.dtype.element_ty), mask=mask_q)
    tl.store(to_k + first, turned_a.to(k_out.dtype.element_ty), mask=mask_k)
    tl.store(to_k + second, turned_b.to(k_out.dtype.element_ty), mask=mask_k)
    if REST > 0:  # features that are not rotated
        column = tl.arange(0, REST)[None, :]
        mask_q, mask_k = is_q & (column < rest), is_k & (column < rest)
        column += 2 * half
        tl.store(to_q + column, tl.load(from_q + column, mask=mask_q), mask=mask_q)
        tl.store(to_k + column, tl.load(from_k + column, mask=mask_k), mask=mask_k)


@dataclass(frozen=True)
class _Angles:
    """The table of cosines and sines, and the position of each token."""

    cos: Tensor
    sin: Tensor
    offset: int
    positions: Tensor | None
    interleaved: bool


def _rotate(q: Tensor, k: Tensor, angles: _Angles, *, inverse: bool, inplace: bool) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = (q, k) if inplace else (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    batch, heads, length, width = q.shape
    half = angles.cos.shape[-1]
    rest = 0 if inplace else width - 2 * half
    half_block = runtime.next_power_of_2(half)
    block = min(runtime.next_power_of_2(heads + k.shape[1]), max(1, _ELEMENTS // half_block))
    given = angles.positions
    strides = [stride for x in (q, k, q_out, k_out) for stride in x.stride()[:3]]
    runtime.launch(
        rotate, (batch * length, runtime.cdiv(heads + k.shape[1], block)), q, k, q_out, k_out,
        angles.cos, angles.sin, angles.cos if given is None else given.contiguous(), angles.offset, length,
        heads, k.shape[1], half, rest, *strides, HEADS=block, HALF=half_block,
        REST=runtime.next_power_of_2(rest) if rest else 0, GIVEN=given is not None, INTERLEAVED=angles.interleaved,
        INVERSE=inverse,
    )  # fmt: skip
    return q_out, k_out


class _RotaryPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, angles: _Angles) -> tuple[Tensor, Tensor]:
        ctx.angles = angles
        return _rotate(q, k, angles, inverse=False, inplace=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_rotate(grads[0], grads[1], ctx.angles, inverse=True, inplace=False), None


def rotary_pair(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    offset: int = 0,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """The rotated queries [b, n, s, d] and keys [b, m, s, d]; where no gradient is needed, in position.

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, s, d].
        cos: Cosines of the angles of positions, fp32 [positions, r/2].
        sin: Sines likewise.
        offset: Position of the first token.
        positions: Position of each token instead, int64 [b, s].
        interleaved: Features 2i and 2i + 1 are a pair, instead of i and i + r/2.
    """
    angles = _Angles(cos, sin, offset, positions, interleaved)
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
        return _rotate(q, k, angles, inverse=False, inplace=q.stride(-1) == 1 and k.stride(-1) == 1)
    turned: tuple[Tensor, Tensor] = _RotaryPair.apply(q, k, angles)
    return turned
