"""Comparison of a kernel with the same formula in float64: values and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Largest difference over the largest value. The interpreter cuts bfloat16 results off instead of rounding them.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
COLUMNS = (1, 3, 127, 1000, 50257)

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def tuple_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def run(function: Function, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """The results of a function and the gradients of its floating-point inputs under given gradients of the results."""
    inputs = [each.detach().requires_grad_(each.is_floating_point()) for each in inputs]
    results = tuple_of(function(*inputs))
    total = sum((result.double() * one.double()).sum() for result, one in zip(results, upstream, strict=True))
    assert isinstance(total, Tensor)
    return [*results, *torch.autograd.grad(total, [each for each in inputs if each.requires_grad])]


def worst(kernel: Function, reference: Function, inputs: Sequence[Tensor]) -> float:
    """The largest difference of a kernel and its formula in float64, over the largest magnitude of each tensor."""
    wide = [each.double() if each.is_floating_point() else each for each in inputs]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        results = tuple_of(reference(*wide))
    upstream = [torch.randn(result.shape, generator=generator, dtype=torch.float64) for result in results]
    dtype = next(each.dtype for each in inputs if each.is_floating_point())
    upstream = [one.to(inputs[0].device, dtype) for one in upstream]
    found, expected = run(kernel, inputs, upstream), run(reference, wide, upstream)
    largest = 0.0
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        if one.numel():
            assert one.isfinite().all()
            scale = max(1.0, other.abs().max().item())
            largest = max(largest, (one.double() - other).abs().max().item() / scale)
    return largest


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values, the same for every type but for rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
