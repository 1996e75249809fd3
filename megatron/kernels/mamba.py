"""Mamba's two kernels: fused if the packages are installed and enabled, else plain.

The fused ones come from the packages causal-conv1d and mamba-ssm and run on CUDA. They support neither an initial state
nor documents; those cases use the plain kernels (kernels/scan.py).

Shapes: b batch, s sequence, d channels of this rank, n state of a channel, w width of the convolution.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.scan import causal_convolution, selective_scan

Convolution = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [b, s, d], taps [d, w], bias [d] or None) -> silu of the causal convolution [b, s, d]."""

Scan = Callable[..., Tensor]
"""(x [b, s, d], step [b, s, d], A [d, n], B [b, s, n], C [b, s, n], D [d], bias of the step [d], gate [b, s, d])
-> the gated output of the state space [b, s, d]."""


@dataclass(frozen=True)
class MambaKernels:
    """The kernels of a Mamba block for full sequences."""

    convolution: Convolution
    """Causal convolution."""
    scan: Scan
    """Selective scan."""


def plain_convolution(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Reference implementation of `fused_convolution`."""
    before = x.new_zeros(x.shape[0], taps.shape[1] - 1, x.shape[2])
    return F.silu(causal_convolution(x, taps, bias, before))


def plain_scan(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, skip: Tensor, bias: Tensor, gate: Tensor
) -> Tensor:
    """Reference implementation of `fused_scan`.

    Args:
        x: [b, s, d].
        step: Step sizes before the softplus [b, s, d].
        rate: A [d, n].
        into: B [b, s, n].
        out: C [b, s, n].
        skip: D [d].
        bias: Added to the step sizes [d].
        gate: The output is multiplied by its silu [b, s, d].
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    step = F.softplus(step.to(wide) + bias.to(wide))
    y, _ = selective_scan(x, step, rate, into, out, skip.to(wide))
    return y.to(x.dtype) * F.silu(gate)


def fused_unavailable(package: str, device: torch.device) -> str | None:
    """Returns the reason why a fused kernel cannot be used, or None. package: its import name."""
    if device.type != "cuda":
        return f"The kernels of {package} are for CUDA, and the model is on {device.type}."
    if importlib.util.find_spec(package) is None:
        return f"The package {package} is not installed; pip install neox[mamba] brings it."
    return None


def fused_convolution(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel of causal-conv1d."""
    from causal_conv1d import causal_conv1d_fn

    y: Tensor = causal_conv1d_fn(x.transpose(1, 2), taps, bias, activation="silu")
    return y.transpose(1, 2)


def fused_scan(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, skip: Tensor, bias: Tensor, gate: Tensor
) -> Tensor:
    """The kernel of mamba-ssm, which has the sequence as last dimension. Returns [b, s, d].

    Args:
        x: [b, s, d].
        step: Step sizes before the softplus [b, s, d].
        rate: A [d, n].
        into: B [b, s, n].
        out: C [b, s, n].
        skip: D [d].
        bias: Added to the step sizes [d].
        gate: The output is multiplied by its silu [b, s, d].
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, step, into, out, gate = (value.transpose(1, 2).contiguous() for value in (x, step, into, out, gate))
    y: Tensor = selective_scan_fn(
        x, step, rate, into, out, D=skip.float(), z=gate, delta_bias=bias.float(), delta_softplus=True
    )
    return y.transpose(1, 2)


def choose_mamba(device: torch.device, *, convolution: bool, scan: bool) -> MambaKernels:
    """Returns the kernels that are enabled and available."""
    conv = convolution and fused_unavailable("causal_conv1d", device) is None
    selective = scan and fused_unavailable("mamba_ssm", device) is None
    return MambaKernels(fused_convolution if conv else plain_convolution, fused_scan if selective else plain_scan)
