"""CPU support for bf16/fp16 matmul, and tensors that compiled code can read."""

from __future__ import annotations

import torch

_SUPPORT = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def needs_fp32_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether matrices of this type are better multiplied in fp32.

    A CPU without instructions for 16 bits (x86 before AVX-512) multiplies them element by element. In fp32 the products
    are exact, so only the order of the sums differs, and a result is rounded once, as elsewhere.
    """
    if device.type != "cpu" or dtype not in _SUPPORT:
        return False
    asked = getattr(torch.ops.mkldnn, _SUPPORT[dtype], None) if torch.backends.mkldnn.is_available() else None
    return asked is None or not asked()


def unreadable_memory(x: torch.Tensor) -> str | None:
    """Returns the reason why compiled code cannot read a tensor by its address, or None."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return f"is for fp32 and bfloat16 on the CPU, not {x.dtype} on {x.device.type}"
    if type(x) is not torch.Tensor and type(x) is not torch.nn.Parameter:
        return f"reads memory, which a {type(x).__name__} may not have"
    if torch.compiler.is_compiling():
        return "is no operator of torch, which a compiled graph needs"
    return None
