"""The activation xIELU (arXiv:2411.13010), with a factor of each side of zero that is learned in every MLP.

    x > 0:   a x² + b x                          a = softplus(alpha_p)
    else:    c (exp(min(x, e)) - 1 - x) + b x    c = b + softplus(alpha_n)

b is 0.5 and e is -1e-6, just below zero. Source: the paper, section 3, and transformers 5.23, activations.py, for e.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.param_init import InitFn, ParamFactory
from megatron.distributed.partial_grads import mark_partial_grad

BETA, EDGE = 0.5, -1e-6
INITIAL = 0.8
"""Initial values of a and c."""


def xielu(x: Tensor) -> Tensor:
    """Maps to xIELU(x) with the initial factors."""
    return _xielu(x, x.new_tensor(INITIAL), x.new_tensor(INITIAL))


class XIELU(nn.Module):
    """xIELU with learned factors, which every tensor-parallel rank applies to its own features."""

    def __init__(self, source: ParamFactory) -> None:
        super().__init__()
        above, below = (_constant(_inverse_softplus(value)) for value in (INITIAL, INITIAL - BETA))
        self.alpha_p = source.replicated("alpha_p", (1,), above, full_sequence=True)
        self.alpha_n = source.replicated("alpha_n", (1,), below, full_sequence=True)
        if source.axis.size > 1:
            for parameter in self.parameters():
                mark_partial_grad(parameter, source.axis)

    def forward(self, x: Tensor) -> Tensor:
        """[..., w/t] -> the same shape."""
        return _xielu(x, F.softplus(self.alpha_p), BETA + F.softplus(self.alpha_n))


class _Function(torch.autograd.Function):
    """Keeps the input alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        ctx.save_for_backward(x, positive, negative)
        return torch.where(x > 0, positive * x * x + BETA * x, _below(x) * negative + BETA * x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, positive, negative = ctx.saved_tensors
        (gradient,) = gradients
        above = x > 0
        slope = torch.where(x < EDGE, torch.exp(x), torch.zeros_like(x)) - 1
        of_x = gradient * (torch.where(above, 2 * positive * x, slope * negative) + BETA)
        terms = (torch.where(above, x * x, 0.0), torch.where(above, 0.0, _below(x)))
        sums = [(gradient.float() * term.float()).sum().to(positive.dtype).reshape(positive.shape) for term in terms]
        return of_x, sums[0], sums[1]


def _xielu(x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    found: Tensor = _Function.apply(x, positive, negative)
    return found


def _below(x: Tensor) -> Tensor:
    return torch.expm1(x.clamp(max=EDGE)) - x


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))


def _constant(value: float) -> InitFn:
    def init(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(value)

    return init
