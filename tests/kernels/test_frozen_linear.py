"""Frozen weights of 4 and 8 bits: how far they are from the weight, what a checkpoint changes, and their product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.kernels.frozen_linear import FrozenLinear
from megatron.kernels.grouped_matmul import frozen_grouped, plain_grouped
from megatron.kernels.linear import choose_linear, linear_ops
from megatron.registry import FROZEN_BLOCK, FROZEN_FORMATS

GAPS = {"nf4": 0.304 / 2, "fp4": (1 - 2 / 3) / 2, "int8": 0.5 / 127}
"""Half the largest distance between two values of a format, as a share of the largest value of a block."""
SHAPE = (48, 3 * FROZEN_BLOCK)


def weight(dtype: torch.dtype) -> torch.Tensor:
    found = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    found[5] = 0.0
    return found.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FROZEN_FORMATS.names)
def test_values_are_the_nearest_of_the_format_and_stay(name: str, dtype: torch.dtype) -> None:
    """A weight that was expanded and is stored again, as a resume does, is the same bit by bit, also in parts."""
    store, given = FROZEN_FORMATS.load(name), weight(dtype)
    matrix = store(given)
    expanded = matrix.expanded()
    assert (expanded.dtype, expanded.shape) == (dtype, given.shape)
    largest = given.float().view(-1, FROZEN_BLOCK).abs().amax(1, keepdim=True)
    apart = (expanded.float() - given.float()).view(-1, FROZEN_BLOCK).abs()
    assert bool((apart <= (GAPS[name] + torch.finfo(dtype).eps) * largest).all())
    assert bool((expanded[5] == 0).all())
    assert torch.equal(store(expanded).expanded(), expanded)
    columns = [store(part).expanded() for part in given.split(FROZEN_BLOCK, dim=1)]
    assert torch.equal(torch.cat(columns, 1), expanded)
    codes, scales = matrix.stored()
    assert codes.nbytes * 8 == FROZEN_FORMATS.entry(name).bits * given.numel()
    assert (scales.dtype, scales.numel()) == (torch.float32, given.numel() // FROZEN_BLOCK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FROZEN_FORMATS.names)
def test_the_product_is_that_of_the_expanded_weight_and_saves_nothing(name: str, dtype: torch.dtype) -> None:
    matrix = FROZEN_FORMATS.load(name)(weight(dtype))
    kernel = FrozenLinear(matrix, linear_ops(choose_linear(torch.device("cpu"), dtype)))
    generator = torch.Generator().manual_seed(4)
    sizes = ((2, 5, SHAPE[1]), (48,), (2, 5, 48))
    x, bias, grad = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    inputs = [each.clone().requires_grad_() for each in (x, bias)]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda one: one):
        y = kernel(inputs[0], None, inputs[1])
    y.backward(grad)
    expected = [each.double().requires_grad_() for each in (x, bias)]
    wide = F.linear(expected[0], matrix.expanded().double(), expected[1])
    wide.backward(grad.double())
    assert saved == []
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for found, correct in zip(
        (y, *(each.grad for each in inputs)), (wide, *(each.grad for each in expected)), strict=True
    ):
        torch.testing.assert_close(found.double(), correct, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("turned", [False, True])
def test_the_product_of_experts_is_that_of_the_expanded_matrices(turned: bool) -> None:
    """One of three experts has no rows; autograd saves how many each has, and no matrix."""
    matrix, counts = FROZEN_FORMATS.load("int8")(weight(torch.float32)), torch.tensor([4, 0, 3])
    stack = matrix.expanded().double().view(3, -1, SHAPE[1])
    stack = stack.transpose(1, 2) if turned else stack
    generator = torch.Generator().manual_seed(5)
    rows, grad = (torch.randn(7, size, generator=generator) for size in stack.shape[1:])
    given, wide = rows.clone().requires_grad_(), rows.double().requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        found = frozen_grouped(plain_grouped, given, matrix, counts, turned=turned)
    expected = torch.cat([part @ each for part, each in zip(wide.split(counts.tolist()), stack, strict=True)])
    found.backward(grad)
    expected.backward(grad.double())
    assert [one.dtype for one in saved] == [torch.int64]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
