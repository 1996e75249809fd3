"""Weights in MXFP4, as the public GPT-OSS folders hold those of experts: unpacked when they are read.

A block is 32 numbers of 4 bits (a sign, two bits of exponent, one of mantissa), and one exponent of 8 bits that they
share (OCP Microscaling Formats 1.0). A matrix [in, out] of an expert is stored by outputs: `<name>_blocks` [experts,
out, in/32, 16] with two numbers a byte, the lower half first, and `<name>_scales` [experts, out, in/32].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Source = Callable[[], Tensor]
BLOCKS, SCALES = "_blocks", "_scales"
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127


def unpacked(sources: dict[str, Source]) -> dict[str, Source]:
    """Returns the tensors with every pair of blocks and scales as one bfloat16 tensor, unpacked when it is read.

    sources: name -> how to read the tensor.
    """
    found = dict(sources)
    for name in sources:
        stem = name.removesuffix(BLOCKS)
        if stem != name and stem + SCALES in sources:
            found[stem] = _reading(found.pop(name), found.pop(stem + SCALES))
    return found


def _reading(blocks: Source, scales: Source) -> Source:
    return lambda: unpack(blocks(), scales())


def unpack(blocks: Tensor, scales: Tensor) -> Tensor:
    """Returns the matrices in bfloat16, which holds every value of the format exactly.

    Args:
        blocks: uint8 [experts, out, groups, 16].
        scales: uint8 [experts, out, groups].
    """
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.bfloat16)
    pairs = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)  # [experts, out, groups, 32]
    numbers = torch.ldexp(values[pairs.int()], (scales.int() - _BIAS).unsqueeze(-1))
    return numbers.flatten(-2).transpose(1, 2)  # [experts, in, out]
