"""The gated delta rule of the package flash-linear-attention, for CUDA; else that of kernels/gated_delta.py.

The package's kernels take whole sequences: documents that are kept apart, padded rows and single tokens go to the plain
ones.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from megatron.kernels.gated_delta import SHORT, DeltaInputs, DeltaRule, gated_delta

PACKAGE = "fla"


def fla_unavailable(device: torch.device) -> str | None:
    """Returns the reason why the package's kernels cannot be used, or None."""
    if device.type != "cuda":
        return f"The kernels of flash-linear-attention are for CUDA, and the model is on {device.type}."
    if importlib.util.find_spec(PACKAGE) is None:
        return "The package flash-linear-attention is not installed; pip install neox[linear-attention] brings it."
    return None


def fused_gated_delta(
    x: DeltaInputs, state: Tensor | None = None, starts: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns what ``gated_delta`` does, by the package's kernel of chunks.

    Args:
        x: the inputs.
        state: before the first position [b, m r, k, v]; zeros if None.
        starts: first position that each position sees [b, s].
        valid: valid positions [b, s].
    """
    if starts is not None or valid is not None or x.q.shape[1] <= SHORT:
        return gated_delta(x, state, starts, valid)
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    ratio, kind = x.v.shape[2] // x.k.shape[2], x.v.dtype
    q, k = (part.repeat_interleave(ratio, dim=2).to(kind) for part in (x.q, x.k))
    y, last = chunk_gated_delta_rule(
        q, k, x.v, x.decay, x.strength.to(kind), scale=1.0, initial_state=state, output_final_state=True
    )
    return y.to(x.q.dtype), last


def choose_gated_delta(device: torch.device, *, fused: bool) -> DeltaRule:
    """Returns the package's kernel if it is asked for and available, else the plain one."""
    return fused_gated_delta if fused and fla_unavailable(device) is None else gated_delta
