"""Initial values of weight matrices: one function for each initialization a configuration can name.

Each function takes the run's numbers and returns an InitFn, which initializes a full matrix [out, in] in place. L is
the number of blocks, h the hidden size, std `init_method_std`. With muP h is that of the base model, and `rescaling`
scales the values for a model wider than the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.distributed.param_init import InitFn, PaddedInit, Rescale
from megatron.param_table import WidthRatio


@dataclass(frozen=True)
class ShapedInit:
    """An InitFn whose standard deviation depends on the shape."""

    draw: InitFn
    """Draws the initial values."""
    std_of: Callable[[Sequence[float]], float]
    """[out, in] -> standard deviation, up to a constant factor."""

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        self.draw(tensor, generator)


def _normal(std: float) -> InitFn:
    def init_fn(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, std, generator=generator)

    return init_fn


def normal(*, std: float, num_layers: int, hidden_size: int) -> InitFn:
    """Normal with standard deviation std (GPT-2)."""
    return _normal(std)


def scaled_normal(*, std: float, num_layers: int, hidden_size: int) -> InitFn:
    """Normal with standard deviation std / sqrt(2 L): each block adds twice to the residual (GPT-2, section 2.3)."""
    return _normal(std / math.sqrt(2 * num_layers))


def single_residual_scaled_normal(*, std: float, num_layers: int, hidden_size: int) -> InitFn:
    """Normal with standard deviation std / sqrt(L), for parallel residual blocks, which add once."""
    return _normal(std / math.sqrt(num_layers))


def small_init(*, std: float, num_layers: int, hidden_size: int) -> InitFn:
    """Normal with standard deviation sqrt(2 / (5 h)) (arXiv:1910.05895, section 2.2)."""
    return _normal(math.sqrt(2 / (5 * hidden_size)))


def wang_init(*, std: float, num_layers: int, hidden_size: int) -> InitFn:
    """Normal with standard deviation 2 / (L sqrt(h)) (GPT-J)."""
    return _normal(2 / (num_layers * math.sqrt(hidden_size)))


def xavier_uniform(*, std: float, num_layers: int, hidden_size: int) -> InitFn:
    """Uniform on +-sqrt(6 / (in + out)) (Glorot and Bengio, 2010, eq. 16)."""

    def init_fn(tensor: Tensor, generator: torch.Generator) -> None:
        torch.nn.init.xavier_uniform_(tensor, generator=generator)

    return ShapedInit(init_fn, _by_sum)


def xavier_normal(*, std: float, num_layers: int, hidden_size: int) -> InitFn:
    """Normal with standard deviation sqrt(2 / (in + out)) (Glorot and Bengio, 2010)."""

    def init_fn(tensor: Tensor, generator: torch.Generator) -> None:
        torch.nn.init.xavier_normal_(tensor, generator=generator)

    return ShapedInit(init_fn, _by_sum)


def _by_sum(shape: Sequence[float]) -> float:
    return sum(shape) ** -0.5


def _orthogonal(gain: float) -> InitFn:
    def init_fn(tensor: Tensor, generator: torch.Generator) -> None:
        torch.nn.init.orthogonal_(tensor, gain=gain, generator=generator)

    return ShapedInit(init_fn, lambda shape: max(shape) ** -0.5)


def orthogonal(*, std: float, num_layers: int, hidden_size: int) -> InitFn:
    """Orthonormal rows or columns, whichever are fewer (arXiv:1312.6120)."""
    return _orthogonal(1.0)


def scaled_orthogonal(*, std: float, num_layers: int, hidden_size: int) -> InitFn:
    """Orthogonal rows or columns of length 1 / sqrt(2 L)."""
    return _orthogonal(1 / math.sqrt(2 * num_layers))


def rescaling(width_ratios: Mapping[str, WidthRatio], factor: float) -> Rescale:
    """Returns initial values under muP: the standard deviation of the base model, over sqrt(width) for a matrix.

    width_ratios: by key. factor: multiplies all initial values.
    """

    def rescale(key: str, init_fn: InitFn, transposed: bool) -> InitFn:
        if isinstance(init_fn, PaddedInit):
            return PaddedInit(rescale(key, init_fn.init_fn, transposed), init_fn.rows)
        width_ratio = width_ratios[key]
        ratios = [ratio or 1.0 for ratio in width_ratio.ratios][:: -1 if transposed else 1]

        def rescaled(tensor: Tensor, generator: torch.Generator) -> None:
            init_fn(tensor, generator)
            target_std = factor * width_ratio.std
            if isinstance(init_fn, ShapedInit):
                base = [size / ratio for size, ratio in zip(tensor.shape, ratios, strict=True)]
                target_std *= init_fn.std_of(base) / init_fn.std_of(tensor.shape)
            if target_std != 1.0:
                tensor.mul_(target_std)

        return rescaled

    return rescale
