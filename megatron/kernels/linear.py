"""The product x Wᵀ + bias.

In fp32 on an x86 CPU torch.nn.functional.linear uses MKL, which on AMD CPUs has less than half the speed of oneDNN;
oneDNN's product is available as an operator without a gradient, so the gradient is written here, that of the weight
with a compiled kernel where there is one. In lower precisions,
and on accelerators, torch is already fast; on a CPU without instructions for 16 bits the product is computed in fp32.

Shapes: leading dimensions are free; in and out are the widths of this rank's weight [out, in].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.cpp_weight_gradient import cpp_weight_gradient, cpp_weight_gradient_unavailable
from megatron.kernels.cpu_features import needs_fp32_matmul
from megatron.kernels.weight_gradients import WeightGradients

LinearKernel = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [..., in], weight [out, in], bias [out] or None) -> [..., out]."""


@dataclass(frozen=True)
class BoundLinear:
    """The kernel of one layer, bound to its weight and bias, with a gradient of its own."""

    product: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.product(x)


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Reference implementation: torch's linear, [..., in] -> [..., out]."""
    return F.linear(x, weight, bias)


def onednn_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the reason why the oneDNN product cannot or need not be used, or None."""
    if device.type != "cpu":
        return f"oneDNN's linear is for the CPU, and the model is on {device.type}."
    if dtype != torch.float32:
        return f"torch's own linear already uses oneDNN for {dtype}."
    if not torch.backends.mkldnn.is_available():
        return "This build of torch has no oneDNN."
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "This version of torch does not offer oneDNN's linear as an operator."
    return None


def choose_linear(device: torch.device, dtype: torch.dtype, later: WeightGradients | None = None) -> LinearKernel:
    """Returns the fastest product for parameters of this type on this device.

    later: takes the gradients of weights that a backward pass leaves for later; None if it leaves none.
    """
    if needs_fp32_matmul(device, dtype):
        kernel: LinearKernel = widened_linear
    else:
        kernel = onednn_linear if onednn_unavailable(device, dtype) is None else plain_linear
    return kernel if later is None else LinearOfOps(replace(linear_ops(kernel), later=later))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ x: [rows, out] and [rows, in] -> [out, in].

    oneDNN's operator copies its transposed first operand, so the narrower one comes first.
    """
    if cpp_weight_gradient_unavailable(grad, x) is None:
        return cpp_weight_gradient(grad, x)
    if grad.shape[1] < x.shape[1]:
        return _product(grad.t(), x.t(), None)
    return _product(x.t(), grad.t(), None).t().contiguous()


def _plain_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return grad.t() @ x


@dataclass(frozen=True)
class LinearOps:
    """The three products of a linear layer, without autograd."""

    product: LinearKernel
    """Forward product, as any kernel."""
    weight_gradient: Callable[[Tensor, Tensor], Tensor]
    """Output gradient [rows, out] and input [rows, in] -> [out, in]."""
    own_input_gradient: Callable[[Tensor, Tensor], Tensor] | None = None
    """Output gradient [rows, out] and weight [out, in] -> [rows, in]; None if it is `product`."""
    later: WeightGradients | None = None
    """Takes the gradients of weights that a backward pass leaves for later."""

    def gradient_of(self, weight: Tensor | None, grad: Tensor, x: Callable[[], Tensor]) -> Tensor | None:
        """Returns the gradient of a weight [out, in]; None if it is computed later.

        Args:
            weight: the weight itself, if its gradient may be computed later.
            grad: output gradient [rows, out].
            x: returns the input [..., in], with as many rows.
        """

        def compute() -> Tensor:
            return self.weight_gradient(grad, x().flatten(0, -2))

        return compute() if self.later is None or weight is None else self.later.take(weight, compute)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Output gradient [rows, out] and weight [out, in] -> [rows, in]."""
        if self.own_input_gradient is not None:
            return self.own_input_gradient(grad, weight)
        return self.product(grad, weight.t(), None)


@dataclass(frozen=True)
class LinearOfOps:
    """A kernel whose gradient is computed by products of its own."""

    ops: LinearOps
    """The products."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in], [out, in] and [out] or None -> [..., out]."""
        y: Tensor = _LinearWithGrad.apply(x, weight, bias, self.ops)
        return y


def linear_ops(kernel: LinearKernel) -> LinearOps:
    """Returns the products of a kernel."""
    return kernel.ops if isinstance(kernel, LinearOfOps) else LinearOps(kernel, _plain_weight_gradient)


def _widened_ops() -> LinearOps:
    return linear_ops(choose_linear(torch.device("cpu"), torch.float32))


def _widened_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide_bias = None if bias is None else bias.float()
    return _widened_ops().product(x.float(), weight.float(), wide_bias).to(x.dtype)


def _widened_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return _widened_ops().weight_gradient(grad.float(), x.float()).to(grad.dtype)


class _LinearWithGrad(torch.autograd.Function):
    """A linear layer whose gradient is computed by the products of its kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ops: LinearOps) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen weight needs no input
        ctx.has_bias, ctx.ops = bias is not None, ops
        ctx.weight = None if ops.later is None else weight  # a recomputed layer saves a copy that is no parameter
        return ops.product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        flat = grads[0].reshape(-1, weight.shape[0])  # [rows, out]
        grad_x = None
        if need_x:
            grad_x = ctx.ops.input_gradient(flat, weight).view(*grads[0].shape[:-1], weight.shape[1])
        grad_weight = ctx.ops.gradient_of(ctx.weight, flat, lambda: x) if need_weight else None
        grad_bias = flat.sum(0) if ctx.has_bias and need_bias else None
        return grad_x, grad_weight, grad_bias, None


onednn_linear = LinearOfOps(LinearOps(_product, _weight_gradient))
"""The product by oneDNN, fp32 on CPU, [..., in] -> [..., out]."""
widened_linear = LinearOfOps(LinearOps(_widened_product, _widened_weight_gradient))
"""The product of 16-bit tensors in fp32, rounded once, [..., in] -> [..., out]."""
