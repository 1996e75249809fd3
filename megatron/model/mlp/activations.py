"""The activations a configuration can name.

A plain one maps [..., w] to [..., w]. A gated one (arXiv:2002.05202) maps [..., 2w] to [..., w]: the first half is
multiplied by the activated second half, as in the public checkpoint layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """Maps to x * Phi(x) with the exact normal distribution function (arXiv:1606.08415)."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Maps to x * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³))) / 2, which GPT-2 was trained with."""
    return F.gelu(x, approximate="tanh")


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
