"""What a low-rank update of a linear layer is made of (arXiv:2106.09685, section 4.1).

    y = x Wᵀ + scale (dropout(x) Aᵀ) Bᵀ

A [rank, in] starts with the uniform distribution on +-1 / sqrt(in), B [out, rank] with zeros, so that the layer begins
as it was. The layers of linear.py hold the two as `lora_A` and `lora_B`, cut as W is: with the outputs of W those of B,
with its inputs those of A, and the other factor is whole on every rank.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.kernels.linear import LinearKernel


@dataclass(frozen=True)
class Update:
    """The numbers that the updates of a model share. dropout: of their input [probability]. random: for its draws."""

    rank: int
    scale: float
    dropout: float
    random: TensorParallelRNG

    def drop(self, x: Tensor, *, training: bool, cut: bool) -> Tensor:
        """Dropout on the input. cut: the ranks hold different parts of x, so that their masks must differ."""
        if self.dropout == 0 or not training:
            return x
        with self.random.fork() if cut else nullcontext():
            return F.dropout(x, self.dropout)


class Factor(nn.Module):
    """One of the two matrices, ``weight``: x -> x weightᵀ, on what this rank holds of both."""

    def __init__(self, weight: nn.Parameter, kernel: LinearKernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.kernel(x, self.weight, None)


def first_factor(tensor: Tensor, generator: torch.Generator) -> None:
    """The Fill of A, as the authors' code and PEFT have it: uniform on +-1 / sqrt(in)."""
    bound = 1 / math.sqrt(tensor.shape[1])
    tensor.uniform_(-bound, bound, generator=generator)
