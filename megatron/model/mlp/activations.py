"""The activations a configuration can name.

A plain one maps [..., w] to [..., w]. A gated one (arXiv:2002.05202) maps [..., 2w] to [..., w]: the first half is
multiplied by the activated second half, as in the public checkpoint layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUICK = 1.702
"""Factor of quick_gelu's sigmoid."""


def gelu(x: Tensor) -> Tensor:
    """Maps to x * Phi(x) with the exact normal distribution function (arXiv:1606.08415)."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Maps to x * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³))) / 2, which GPT-2 was trained with."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """Maps to x * sigmoid(1.702 x), which is near gelu (arXiv:1606.08415, section 2)."""
    return x * torch.sigmoid(QUICK * x)


def relu(x: Tensor) -> Tensor:
    """Maps to max(x, 0)."""
    return F.relu(x)


def squared_relu(x: Tensor) -> Tensor:
    """Maps to max(x, 0)² (arXiv:2109.08668, section 3.1)."""
    return F.relu(x).square()


def silu(x: Tensor) -> Tensor:
    """Maps to x * sigmoid(x); also called swish (arXiv:1710.05941)."""
    return F.silu(x)


def softsign(x: Tensor) -> Tensor:
    """Maps to x / (1 + |x|)."""
    return F.softsign(x)


def mish(x: Tensor) -> Tensor:
    """Maps to x * tanh(softplus(x)) (arXiv:1908.08681)."""
    return F.mish(x)


def swiglu(x: Tensor) -> Tensor:
    """Maps to up * silu(gate)."""
    up, gate = x.chunk(2, dim=-1)
    return up * F.silu(gate)


def geglu(x: Tensor) -> Tensor:
    """Maps to up * gelu(gate)."""
    up, gate = x.chunk(2, dim=-1)
    return up * F.gelu(gate)


def geglu_tanh(x: Tensor) -> Tensor:
    """Maps to up * gelu(gate), gelu by its tanh formula."""
    up, gate = x.chunk(2, dim=-1)
    return up * F.gelu(gate, approximate="tanh")


def quick_geglu(x: Tensor) -> Tensor:
    """Maps to up * quick_gelu(gate)."""
    up, gate = x.chunk(2, dim=-1)
    return up * quick_gelu(gate)


def reglu(x: Tensor) -> Tensor:
    """Maps to up * relu(gate)."""
    up, gate = x.chunk(2, dim=-1)
    return up * F.relu(gate)


def glu(x: Tensor) -> Tensor:
    """Maps to up * sigmoid(gate)."""
    up, gate = x.chunk(2, dim=-1)
    return up * torch.sigmoid(gate)


def bilinear(x: Tensor) -> Tensor:
    """Maps to up * gate."""
    up, gate = x.chunk(2, dim=-1)
    return up * gate


@dataclass(frozen=True)
class BoundedGate:
    """A gated activation of halves that are bounded, and of a plain half that is shifted, as in GPT-OSS."""

    activation: Callable[[Tensor], Tensor]
    """[..., 2w] -> [..., w]."""
    bound: float | None
    """Largest gate, and largest absolute value of the plain half; None bounds neither."""
    offset: float
    """Added to the plain half."""

    def __call__(self, x: Tensor) -> Tensor:
        """[..., 2w] -> [..., w]."""
        up, gate = x.chunk(2, dim=-1)
        if self.bound is not None:
            up, gate = up.clamp(-self.bound, self.bound), gate.clamp(max=self.bound)
        return self.activation(torch.cat((up + self.offset, gate), dim=-1))
