"""Formats of frozen weights, which the name `base` of the key `lora` chooses."""

from __future__ import annotations

from megatron.registry.entry import FrozenFormatEntry
from megatron.registry.registry import Registry

FROZEN_BLOCK = 64
"""Values of a row of a weight that share a scale."""

FROZEN_FORMATS = Registry(
    "format of frozen weights",
    "lora",
    [
        FrozenFormatEntry(
            "nf4",
            "megatron.kernels.four_bits:nf4",
            "4 bits, the quantiles of a normal distribution (arXiv:2305.14314)",
            bits=4,
            extra="bitsandbytes",
        ),
        FrozenFormatEntry(
            "fp4",
            "megatron.kernels.four_bits:fp4",
            "4 bits, floating point",
            bits=4,
            extra="bitsandbytes",
        ),
        FrozenFormatEntry("int8", "megatron.kernels.frozen_linear:int8", "8 bits, integers", bits=8),
    ],
)
