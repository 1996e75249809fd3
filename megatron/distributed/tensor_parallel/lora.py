"""LoRA adapter of a linear layer (arXiv:2106.09685, section 4.1).

y = x Wᵀ + scale (dropout(x) Aᵀ) Bᵀ

A [rank, in] is initialized uniformly on +-1 / sqrt(in), B [out, rank] with zeros, so that the initial output is that of
W alone. The layers of linear.py hold the two as `lora_A` and `lora_B`. Where the outputs of W are sharded, so are those
of B; where its inputs are, so are those of A; the other matrix is replicated.

With DoRA (arXiv:2402.09353, equation 5) the rows of W + scale B A are scaled to trained norms m:

y = m / |W + scale B A| (x Wᵀ + scale (x Aᵀ) Bᵀ)

The norms of the rows are constants of the backward pass (section 4.3 there), and m starts as them.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.collectives import all_reduce
from megatron.distributed.mesh import Axis
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.kernels.linear import LinearKernel, choose_linear


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
    magnitudes: bool = False
    """Whether the norms of the rows are trained (DoRA)."""

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


class RowMagnitudes(nn.Module):
    """The trained norms of the rows of W + scale B A, ``weight`` [out] or this rank's shard of it."""

    def __init__(self, weight: nn.Parameter, scale: float, axis: Axis | None) -> None:
        """Makes the module.

        Args:
            weight: the norms.
            scale: factor of the product B A.
            axis: ranks that hold shards of the inputs, over which squares are summed; None if each has full rows.
        """
        super().__init__()
        self.weight = weight
        self.scale = scale
        self.axis = axis
        self.constant: Tensor | None = None

    def forward(self, base: Tensor, product: Tensor, change: Tensor, factor: Tensor) -> Tensor:
        """Returns the outputs [..., out] without a bias.

        Args:
            base: x Wᵀ.
            product: the same of the input with dropout; `base` itself without.
            change: scale (x Aᵀ) Bᵀ of the input with dropout.
            factor: what `factor` returns.
        """
        scaled: Tensor = factor * (product + change)
        return scaled if product is base else base - product + scaled

    def factor(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Returns m / |W + scale B A|, [out].

        Args:
            weight: W, or this rank's shard.
            down: A, or this rank's shard.
            up: B, or this rank's shard.
        """
        if self.constant is not None:
            return self.constant
        return self.weight / self.norms(weight, down, up).clamp_min(torch.finfo(self.weight.dtype).tiny)

    @torch.no_grad()
    def norms(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Returns |W + scale B A| of each row, [out], in the type of the weight. Arguments as of `factor`.

        Its square is |w|² + 2 scale b·(A w) + scale² bᵀ A Aᵀ b, which needs no matrix as large as W.
        """
        wide = up.float()
        inner = choose_linear(weight.device, weight.dtype)(weight, down, None).float()  # [out, rank]
        gram = down.float() @ down.float().T  # [rank, rank]
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        squares += (wide * (2 * self.scale * inner + self.scale**2 * (wide @ gram))).sum(1)
        if self.axis is not None:
            squares = all_reduce(squares, self.axis)
        norms: Tensor = squares.clamp_min(0).sqrt().to(weight.dtype)
        return norms

    @torch.no_grad()
    def start(self, weight: Tensor, down: Tensor, up: Tensor) -> None:
        """Sets m to the norms, so that the rows stay as they are. Arguments as of `factor`."""
        self.weight.copy_(self.norms(weight, down, up))

    @torch.no_grad()
    def hold(self, weight: Tensor, down: Tensor, up: Tensor) -> None:
        """Keeps the factor for good, for a model that is trained no more. Arguments as of `factor`."""
        self.constant = self.factor(weight, down, up)


def magnitude_arguments(layer: nn.Module) -> tuple[RowMagnitudes, tuple[Tensor, Tensor, Tensor]] | None:
    """Returns the magnitudes of a linear layer with W, A and B; None for other modules."""
    magnitudes = getattr(layer, "lora_magnitude_vector", None)
    if not isinstance(magnitudes, RowMagnitudes):
        return None
    weights = (layer.weight, layer.lora_A.weight, layer.lora_B.weight)  # type: ignore[union-attr]
    return magnitudes, cast("tuple[Tensor, Tensor, Tensor]", weights)


def init_lora_a(tensor: Tensor, generator: torch.Generator) -> None:
    """The InitFn of A, as in the authors' code and PEFT: uniform on +-1 / sqrt(in)."""
    bound = 1 / math.sqrt(tensor.shape[1])
    tensor.uniform_(-bound, bound, generator=generator)
