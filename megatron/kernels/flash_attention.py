"""Attention by the flash-attn package (arXiv:2307.08691), for blocks of kind `flash` on a GPU in half precision.

It supports a sliding window. What it does not support (document masks, layouts of blocks, biases), and machines without
it, use the attention of all other blocks, which is torch's flash backend if torch can use that. Reference:
plain_attention.

Shapes: b micro batch, n query heads, m key/value heads, s positions, d head dim.
"""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
from torch import Tensor

from megatron.kernels.activations import Activation
from megatron.kernels.attention import AttentionKernel, choose_attention
from megatron.kernels.attention_patterns import AttentionMask, window_for_package


def flash_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the reason why the flash-attn package cannot be used, or None."""
    if device.type != "cuda":
        return f"flash-attn is for GPUs, and the model is on {device.type}."
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn is for fp16 and bfloat16, not {dtype}."
    if importlib.util.find_spec("flash_attn") is None:
        return "The package flash-attn is not installed."
    return None


def choose_flash(device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """Returns the attention core of blocks of kind `flash`."""
    usual = choose_attention(device)
    return usual if flash_unavailable(device, dtype) is not None else partial(flash_attention, usual)


def flash_attention(
    usual: AttentionKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    starts: Tensor | None = None,
    view: AttentionMask | None = None,
) -> Tensor:
    """Attention by flash-attn, [b, n, s, d].

    Args:
        usual: Kernel for what flash-attn does not support.
        q: Queries [b, n, s, d].
        k: Keys [b, m, keys, d].
        v: Values [b, m, keys, d].
        dropout: Dropout of the probabilities.
        starts: The first key that each query may see, [b, s].
        view: Mask besides the causal one.
    """
    behind = window_for_package(starts, view)
    if behind is None:
        return usual(q, k, v, dropout, starts, view)
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(
        *(x.transpose(1, 2) for x in (q, k, v)),
        dropout_p=dropout,
        causal=True,
        window_size=(behind, -1 if behind < 0 else 0),
    )
    return out.transpose(1, 2)  # [b, n, s, d]


def flash_swiglu_of(name: str, formula: Activation) -> Activation:
    """Returns flash-attn's swiglu, which multiplies its second argument by the activated first."""
    from flash_attn.ops.activations import swiglu

    def fused(x: Tensor) -> Tensor:
        up, gate = x.chunk(2, dim=-1)
        y: Tensor = swiglu(gate, up)
        return y

    return fused
