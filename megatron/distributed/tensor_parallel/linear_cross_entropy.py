"""Output layer and cross entropy in blocks of tokens, so that no tensor of all logits exists.

With a large vocabulary the logits [s, b, v] are by far the largest tensor of a step. Here the logits of a block of
tokens are computed, become the gradient of their loss in the same memory, are multiplied into the gradients of the
hidden states and of the matrix, and make room for the next block. The work is that of the separate layers: one product
forward and two for the gradients, all of them in the forward pass; the backward pass scales the results.

Shapes: r rows (tokens), h hidden, v vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.distributed.mesh import Axis
from megatron.distributed.tensor_parallel.cross_entropy import LossTerms, loss_of_rows
from megatron.kernels.cpp_weight_gradient import cpp_weight_gradient, cpp_weight_gradient_unavailable
from megatron.kernels.cpu_features import needs_fp32_matmul
from megatron.kernels.cross_entropy import SoftmaxPass, softmax_pass
from megatron.kernels.linear import LinearKernel, LinearOps, linear_ops
from megatron.output_blocks import rows_of_a_block

_PART_ELEMENTS = 1 << 22
"""Elements of the matrix's gradient that a block adds at a time."""
_HALF = (torch.float16, torch.bfloat16)


class WeightLink:
    """Lets the gradient of the matrix enter the graph where the hidden states leave a model.

    An engine that scales or prepares gradients at the outputs of its forward pass must see all of them. Where the loss
    is computed after that, `anchor` is one more output, a 0 that depends on the matrix and is added to the loss; its
    gradient is the factor of the matrix's gradient, which the loss leaves here.
    """

    def __init__(self, weight: Tensor) -> None:
        self.gradient: Tensor | None = None
        self.anchor: Tensor = _Anchor.apply(weight, self)


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, link: WeightLink) -> Tensor:
        ctx.link = link
        return torch.zeros((), dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        gradient, ctx.link.gradient = ctx.link.gradient, None
        return None if gradient is None else _scaled(gradient, grads[0]), None


@dataclass(frozen=True)
class TokenTargets:
    """What the loss of each token needs besides its logits."""

    labels: Tensor
    """Global token ids [s, b]."""
    weights: Tensor
    """Weight of each token in the sum, fp32 [s, b]."""
    vocabulary: int | None = None
    """Number of tokens; logits of padding rows get no probability. None if there is no padding."""
    z_loss: float = 0.0
    """Coefficient of the squared log-sum-exp of the logits (arXiv:2204.02311, section 5)."""
    link: WeightLink | None = None
    """Takes the gradient of the matrix, if the graph of the loss must not lead to it directly."""
    bias: Tensor | None = None
    """Added to the logits, [v/t]; None for none."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: TokenTargets,
    axis: Axis,
    kernel: LinearKernel,
    softmax: SoftmaxPass = softmax_pass,
    bound: float | None = None,
) -> Tensor:
    """sum(weights * (-log p(label) + z_loss * log_sum_exp²)) of the logits hidden weightᵀ: an fp32 scalar.

    It can be differentiated once. The gradient of the hidden states is this rank's term of a sum over the axis.

    Args:
        hidden: Inputs of the output layer [s, b, h].
        weight: This rank's rows of its matrix [v/t, h].
        targets: Labels and weights of the tokens.
        axis: Tensor-parallel ranks, which all get the same loss.
        kernel: Matrix product.
        softmax: Softmax over the vocabulary.
        bound: Bound c of the logits, which are c tanh(logit / c) then (arXiv:2408.00118, section 2); None for none.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    settings = _LossSettings(targets, axis, linear_ops(kernel), softmax, torch.is_grad_enabled(), bound)
    total: Tensor = _LinearCrossEntropy.apply(rows, weight, targets.bias, settings)
    return total if targets.link is None else total + targets.link.anchor


@dataclass(frozen=True)
class _LossSettings:
    targets: TokenTargets
    axis: Axis
    ops: LinearOps
    softmax: SoftmaxPass
    grad_enabled: bool
    bound: float | None = None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: _LossSettings) -> Tensor:
        need_hidden, need_weight, need_bias = (need and settings.grad_enabled for need in ctx.needs_input_grad[:3])
        ops, targets = settings.ops, settings.targets
        labels, weights = targets.labels.reshape(-1), targets.weights.reshape(-1)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        gradient = _WeightGradient(weight, ops) if need_weight else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if need_bias and bias is not None else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        blocks = list(_blocks(hidden, weight))
        for block in blocks:
            logits = ops.product(hidden[block], weight, bias)  # [rows of the block, v/t]
            terms = LossTerms(labels[block], weights[block], settings.axis, targets.vocabulary, targets.z_loss)
            slope = None if settings.bound is None else _bound_inplace(logits, settings.bound)
            total += loss_of_rows(logits, terms, settings.softmax, overwrite=need_hidden or need_weight or need_bias)
            if slope is not None:
                logits.mul_(slope)  # now the gradient of what the product gave
            if grad_hidden is not None:
                grad_hidden[block] = ops.input_gradient(logits, weight)
            if gradient is not None:
                gradient.add(logits, hidden[block], last=len(blocks) == 1)
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=wide)
            del logits
        grad_weight = None if gradient is None else gradient.result()
        if targets.link is not None:
            targets.link.gradient, grad_weight = grad_weight, None
        ctx.gradients = (
            grad_hidden,
            grad_weight,
            None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if ctx.gradients is None:
            raise RuntimeError("this loss can be differentiated once: its gradients are computed with its value")
        found, ctx.gradients = ctx.gradients, None
        grad_hidden, grad_weight, grad_bias = (None if each is None else _scaled(each, grads[0]) for each in found)
        return grad_hidden, grad_weight, grad_bias, None


def bounded(logits: Tensor, bound: float | None) -> Tensor:
    """Returns bound * tanh(logits / bound), computed in fp32 at least; the logits themselves without a bound."""
    if bound is None:
        return logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (bound * torch.tanh(wide / bound)).to(logits.dtype)


def _bound_inplace(logits: Tensor, bound: float) -> Tensor:
    """Puts logits within the bound and returns the derivative of that, a tensor of the same size."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    inside = torch.tanh(wide / bound)
    logits.copy_(bound * inside)
    return inside.square_().neg_().add_(1.0).to(logits.dtype)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiplies in place; on a CPU a factor of 1 costs nothing (reading it would stall an accelerator)."""
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return gradient
    return gradient.mul_(factor)


class _WeightGradient:
    """The gradient of the matrix [v/t, h], a sum over blocks; of 16-bit weights it is summed in fp32."""

    def __init__(self, weight: Tensor, ops: LinearOps) -> None:
        self._weight, self._ops = weight, ops
        self._sum: Tensor | None = None

    def add(self, grad: Tensor, x: Tensor, *, last: bool) -> None:
        """Adds gradᵀ x. last: it is the only block, whose product is the gradient."""
        if last:
            self._sum = self._ops.weight_gradient(grad, x)
            return
        if cpp_weight_gradient_unavailable(grad, x) is None:
            self._sum = cpp_weight_gradient(grad, x, self._sum)
            return
        if self._sum is None:
            wide = torch.float32 if self._weight.dtype in _HALF else self._weight.dtype
            self._sum = torch.zeros(self._weight.shape, dtype=wide, device=grad.device)
        if grad.dtype == self._sum.dtype:
            self._sum.addmm_(grad.t(), x)
            return
        widened = needs_fp32_matmul(grad.device, grad.dtype)
        for part in _ranges(grad.shape[1], max(1, _PART_ELEMENTS // x.shape[1])):
            if widened:
                self._sum[part].addmm_(grad[:, part].t().to(self._sum.dtype), x.to(self._sum.dtype))
            else:
                self._sum[part] += self._ops.weight_gradient(grad[:, part], x)

    def result(self) -> Tensor | None:
        """The gradient in the type of the weight."""
        return None if self._sum is None else self._sum.to(self._weight.dtype)


def _blocks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Yields ranges of rows, so that the logits of each have about the same number of elements."""
    yield from _ranges(hidden.shape[0], rows_of_a_block(weight.shape[0], cpu=hidden.device.type == "cpu"))


def _ranges(count: int, size: int) -> Iterator[slice]:
    """Yields ranges of at most `size`, of nearly equal lengths."""
    parts = max(1, -(-count // size))
    for part in range(parts):
        yield slice(part * count // parts, (part + 1) * count // parts)
