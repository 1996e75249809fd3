"""Frozen weights in 4 bits, by the package bitsandbytes, on processors and GPUs (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from megatron.registry.frozen import FROZEN_BLOCK


@dataclass(frozen=True)
class FourBitMatrix:
    """A weight as codes, two a byte, and what bitsandbytes expands them by."""

    codes: Tensor
    """uint8 [values / 2, 1]."""
    state: Any
    """Scales, fp32 [values / 64], shape and type of the weight."""

    def expanded(self) -> Tensor:
        """Returns the weight in its type, [out, in]."""
        weight: Tensor = dequantize_4bit(self.codes, self.state)
        return weight

    def stored(self) -> tuple[Tensor, Tensor]:
        """Returns codes and scales."""
        return self.codes, self.state.absmax


def nf4(weight: Tensor) -> FourBitMatrix:
    """Stores a weight [out, in], whose rows have a multiple of 64 values, by quantiles of a normal distribution."""
    return _stored(weight, "nf4")


def fp4(weight: Tensor) -> FourBitMatrix:
    """Stores a weight [out, in], whose rows have a multiple of 64 values, in floating point."""
    return _stored(weight, "fp4")


def _stored(weight: Tensor, kind: str) -> FourBitMatrix:
    return FourBitMatrix(*quantize_4bit(weight.detach().contiguous(), blocksize=FROZEN_BLOCK, quant_type=kind))
