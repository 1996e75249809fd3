"""LoRA adapter of a linear layer (arXiv:2106.09685, section 4.1).

y = x Wᵀ + scale (dropout(x) Aᵀ) Bᵀ

A [rank, in] is initialized uniformly on +-1 / sqrt(in), B [out, rank] with zeros, so that the initial output is that of
W alone. The layers of linear.py hold the two as `lora_A` and `lora_B`. Where the outputs of W are sharded, so are those
of B; where its inputs are, so are those of A; the other matrix is replicated.
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
class LoraSpec:
    """The numbers that all adapters of a model share."""

    rank: int
    """Rank of the update."""
    scale: float
    """Factor of the update, alpha / rank."""
    dropout: float
    """Dropout of the input [probability]."""
    random: TensorParallelRNG
    """Generator of the dropout masks."""

    def drop(self, x: Tensor, *, training: bool, sharded: bool) -> Tensor:
        """Applies dropout to the input.

        Args:
            x: input of the adapter.
            training: whether dropout is active.
            sharded: true if the ranks hold different shards of x, so that their masks must differ.
        """
        if self.dropout == 0 or not training:
            return x
        with self.random.fork() if sharded else nullcontext():
            return F.dropout(x, self.dropout)


class LoraMatrix(nn.Module):
    """One of the two matrices, ``weight``: x -> x weightᵀ, on this rank's shards of both."""

    def __init__(self, weight: nn.Parameter, kernel: LinearKernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.kernel(x, self.weight, None)


def init_lora_a(tensor: Tensor, generator: torch.Generator) -> None:
    """The InitFn of A, as in the authors' code and PEFT: uniform on +-1 / sqrt(in)."""
    bound = 1 / math.sqrt(tensor.shape[1])
    tensor.uniform_(-bound, bound, generator=generator)
