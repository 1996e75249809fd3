"""Linear layers whose three products have FP8 operands (arXiv:2209.05433), without a package.

Weights, inputs and gradients stay in the precision of the model; each product rounds its two operands to 8 bits under
scales of its own, and sums in fp32. The recipes differ in what shares a scale, which is the largest absolute value
divided by the largest number of the format:

- `tensorwise`: a tensor. Gradients of outputs are e5m2, all else e4m3.
- `rowwise`: a row along the summed dimension, all e4m3, scales rounded up to powers of two, which are exact.
- `blockwise` (arXiv:2412.19437, section 3.3): 128 values along the summed dimension, and 128 x 128 of a weight, all
  e4m3.

A GPU multiplies the 8-bit numbers themselves; a CPU multiplies the same numbers in fp32, so that both differ in the
order of sums only.

Shapes: r rows (tokens), n outputs and k inputs of this rank's weight [n, k].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.linear import LinearOfOps, LinearOps
from megatron.registry.fp8 import BLOCK, Fp8Recipe, ScaleSharing

E4M3 = torch.float8_e4m3fn


_SHARED_DIMS: Mapping[ScaleSharing, tuple[int, ...]] = MappingProxyType(
    {ScaleSharing.TENSOR: (0, 1), ScaleSharing.ROW: (1,), ScaleSharing.TILE: (2,), ScaleSharing.BLOCK: (1, 3)}
)


@dataclass(frozen=True)
class Fp8Operand:
    """An operand of a product, [rows, summed], in 8 bits."""

    values: Tensor
    """8-bit numbers [rows, summed]."""
    scale: Tensor
    """fp32, values * scale is the operand: [], [rows, 1], [rows, summed / 128] or [rows / 128, summed / 128]."""
    sharing: ScaleSharing
    """Which values share a scale."""

    def widened(self) -> Tensor:
        """The rounded operand in fp32, [rows, summed]."""
        scale = self.scale
        if self.sharing in (ScaleSharing.TILE, ScaleSharing.BLOCK):
            scale = scale.repeat_interleave(BLOCK, dim=1)
        if self.sharing is ScaleSharing.BLOCK:
            scale = scale.repeat_interleave(BLOCK, dim=0)
        return self.values.float() * scale


def quantize(x: Tensor, sharing: ScaleSharing, dtype: torch.dtype, *, power_of_two: bool = False) -> Fp8Operand:
    """Rounds an operand to 8 bits.

    Zeros get the scale 1. A NaN or an infinity becomes NaN in everything that shares its scale.

    Args:
        x: Operand [rows, summed].
        sharing: Which values share a scale.
        dtype: The 8-bit format.
        power_of_two: True to round scales up to powers of two.
    """
    rows, summed = x.shape
    wide = x.float()
    if sharing is ScaleSharing.TILE:
        wide = wide.view(rows, summed // BLOCK, BLOCK)
    elif sharing is ScaleSharing.BLOCK:
        wide = wide.view(rows // BLOCK, BLOCK, summed // BLOCK, BLOCK)
    most = wide.abs().amax(_SHARED_DIMS[sharing], keepdim=True)
    scale = torch.where(most == 0, 1.0, most / torch.finfo(dtype).max)
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    values = (wide / scale).to(dtype).view(rows, summed)
    if sharing is ScaleSharing.TENSOR:
        return Fp8Operand(values, scale.view(()), sharing)
    return Fp8Operand(values, scale.view(scale.shape[0], -1), sharing)


def fp8_product(a: Fp8Operand, b: Fp8Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A bᵀ + bias, summed in fp32: [m, summed] and [n, summed] -> [m, n].

    Args:
        a: First operand.
        b: Second operand.
        bias: [n] or None.
        dtype: Type of the result.
    """
    if a.values.device.type == "cpu":
        y = a.widened() @ b.widened().t()
        return (y if bias is None else y + bias.float()).to(dtype)
    first, second = _DEVICE_SCALING[a.sharing], _DEVICE_SCALING[b.sharing]
    y = F.scaled_mm(
        a.values,
        b.values.t(),
        _device_scale(a),
        first,
        _device_scale(b),
        second,
        output_dtype=dtype,
    )
    return y if bias is None else y + bias


_DEVICE_SCALING: Mapping[ScaleSharing, F.ScalingType] = MappingProxyType(
    {
        ScaleSharing.TENSOR: F.ScalingType.TensorWise,
        ScaleSharing.ROW: F.ScalingType.RowWise,
        ScaleSharing.TILE: F.ScalingType.BlockWise1x128,
        ScaleSharing.BLOCK: F.ScalingType.BlockWise128x128,
    }
)


def _device_scale(operand: Fp8Operand) -> Tensor:
    """Returns the scale in the memory layout of torch's product.

    Tiles are contiguous along the rows; blocks are [summed / 128, rows / 128], contiguous along the first dimension,
    which is padded to a multiple of 4.
    """
    if operand.sharing is ScaleSharing.TILE:
        return operand.scale.t().contiguous().t()
    if operand.sharing is ScaleSharing.BLOCK:
        return F.pad(operand.scale, (0, -operand.scale.shape[1] % 4)).t()
    return operand.scale


def fp8_linear(recipe: Fp8Recipe) -> LinearOfOps:
    """Returns the product of linear layers under a recipe, whose two gradients are products in FP8 as well."""
    gradient_format: torch.dtype = getattr(torch, recipe.gradient_format)

    def value(x: Tensor, dtype: torch.dtype = E4M3) -> Fp8Operand:
        return quantize(x.contiguous(), recipe.values, dtype, power_of_two=recipe.power_of_two)

    def parameter(weight: Tensor) -> Fp8Operand:
        return quantize(weight.contiguous(), recipe.weights, E4M3, power_of_two=recipe.power_of_two)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = fp8_product(value(x.reshape(-1, x.shape[-1])), parameter(weight), bias, x.dtype)
        return y.view(*x.shape[:-1], weight.shape[0])

    def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
        return fp8_product(value(grad, gradient_format), parameter(weight.t()), None, grad.dtype)

    def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
        return fp8_product(value(grad.t(), gradient_format), value(x.t()), None, grad.dtype)

    return LinearOfOps(LinearOps(product, weight_gradient, input_gradient))
