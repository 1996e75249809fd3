"""Saved activations of a gated delta net in place of attention, by the plain kernels [bytes].

The counts follow from the operations of megatron/model/mixers/gated_delta_net.py and megatron/kernels/gated_delta.py;
tests/plan/test_activations.py compares them with autograd.

t tensor parallel degree.
"""

from __future__ import annotations

from megatron.param_table import DeltaDims

FP32 = 4
CHUNK = 64
"""Positions of a chunk."""


def delta_bytes(sizes: DeltaDims, tp: int, width: int) -> int:
    """Returns the bytes of a token: the projection, the convolution, fp32 inputs of the heads, chunks, norm and gate.

    Args:
        sizes: of the net.
        tp: tensor parallel degree.
        width: bytes of an activation.
    """
    mixed, keys, values = sum(sizes.mixed), sizes.mixed[1], sizes.value_size
    around = (sum(sizes.projected) + 2 * mixed + values) * width
    heads = (mixed + 2 * keys) * FP32 + values * (4 if width == FP32 else 5) * FP32
    of_head = CHUNK + sizes.key * sizes.value // CHUNK + 8
    return (around + heads + sizes.value_heads * of_head * FP32) // tp
