"""The product x Wᵀ + bias with a frozen weight in 4 or 8 bits, and the format of 8 bits.

A weight is stored as codes and a scale for each 64 values of a row, and expanded for each product, forward and
backward; autograd saves nothing. Storing an expanded weight again gives the same codes and scales, since the largest
value of a block is exact, so that a checkpoint may hold expanded weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.kernels.linear import LinearOps
from megatron.registry.frozen import FROZEN_BLOCK

LARGEST = 127  # of the codes of 8 bits


class FrozenMatrix(Protocol):
    """A weight [out, in] in few bits."""

    def expanded(self) -> Tensor:
        """Returns the weight in its type, [out, in]."""

    def stored(self) -> tuple[Tensor, Tensor]:
        """Returns codes and scales."""


@dataclass(frozen=True)
class EightBitMatrix:
    """A weight as integers from -127 to 127, and the largest value of each block."""

    codes: Tensor
    """int8 [blocks, 64]."""
    scales: Tensor
    """fp32 [blocks, 1]."""
    shape: torch.Size
    """Of the weight."""
    dtype: torch.dtype
    """Of the weight."""

    def expanded(self) -> Tensor:
        """Returns the weight in its type, [out, in]."""
        return (self.codes.float() / LARGEST * self.scales).to(self.dtype).view(self.shape)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Returns codes and scales."""
        return self.codes, self.scales


def int8(weight: Tensor) -> EightBitMatrix:
    """Stores a weight [out, in], whose rows have a multiple of 64 values, in 8 bits."""
    blocks = weight.detach().float().reshape(-1, FROZEN_BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    codes = (blocks * (LARGEST / scales.clamp_min(torch.finfo(torch.float32).tiny))).round().to(torch.int8)
    return EightBitMatrix(codes, scales, weight.shape, weight.dtype)


@dataclass(frozen=True)
class FrozenLinear:
    """The kernel of a layer whose weight is stored in few bits."""

    matrix: FrozenMatrix
    """The weight."""
    ops: LinearOps
    """The products with it when it is expanded."""

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """[..., in] and [out] or None -> [..., out]. weight: not read."""
        y: Tensor = _FrozenProduct.apply(x, bias, self.matrix, self.ops)
        return y


class _FrozenProduct(torch.autograd.Function):
    """The product, and its gradients of input and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, matrix: FrozenMatrix, ops: LinearOps) -> Tensor:
        ctx.matrix, ctx.ops = matrix, ops
        return ops.product(x, matrix.expanded(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        need_x, need_bias, _, _ = ctx.needs_input_grad
        grad_x = None
        if need_x:
            weight = ctx.matrix.expanded()
            flat = grads[0].reshape(-1, weight.shape[0])  # [rows, out]
            grad_x = ctx.ops.input_gradient(flat, weight).view(*grads[0].shape[:-1], weight.shape[1])
        return grad_x, grads[0].flatten(0, -2).sum(0) if need_bias else None, None, None
