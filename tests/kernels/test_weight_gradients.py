"""Gradients of weights that are computed later are those of one backward pass, and reach the hooks of their weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from megatron.kernels.linear import choose_linear
from megatron.kernels.weight_gradients import WeightGradients, add_deferred

CPU = torch.device("cpu")


def model(
    later: WeightGradients | None, dtype: torch.dtype, *, recomputed: bool
) -> tuple[list[Parameter], Tensor, Tensor]:
    """Weights, input and output of two layers."""
    generator = torch.Generator().manual_seed(3)
    weights = [Parameter(torch.randn(8, 8, generator=generator).to(dtype)) for _ in range(2)]
    bias = Parameter(torch.randn(8, generator=generator).to(dtype))
    x = torch.randn(5, 2, 8, generator=generator).to(dtype).requires_grad_()
    kernel = choose_linear(CPU, dtype, later)

    def layers(value: Tensor) -> Tensor:
        return kernel(kernel(value, weights[0], bias).tanh(), weights[1], None)

    output = checkpoint(layers, x, use_reentrant=False) if recomputed else layers(x)
    return [*weights, bias], x, output


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_they_are_those_of_one_pass(dtype: torch.dtype, recomputed: bool) -> None:
    expected, expected_x, output = model(None, dtype, recomputed=False)
    output.square().sum().backward()
    later = WeightGradients()
    weights, x, output = model(later, dtype, recomputed=recomputed)
    seen: list[int] = []
    for number, weight in enumerate(weights):

        def hook(weight: Tensor, number: int = number) -> None:
            if weight.grad is not None:
                seen.append(number)

        weight.register_post_accumulate_grad_hook(hook)
    with later.collect() as found:
        output.square().sum().backward()
    assert [weight.grad is None for weight in weights] == [True, True, False]
    assert torch.equal(x.grad, expected_x.grad)
    assert seen == [2]
    add_deferred(found)
    assert found == []
    assert sorted(seen) == [0, 1, 2]
    for weight, one in zip(weights, expected, strict=True):
        assert torch.equal(weight.grad, one.grad)


def test_outside_of_a_collection_nothing_is_left() -> None:
    weights, _, output = model(WeightGradients(), torch.float32, recomputed=False)
    output.sum().backward()
    assert all(weight.grad is not None for weight in weights)


def test_a_computed_weight_has_its_gradient_at_once() -> None:
    later = WeightGradients()
    weight = Parameter(torch.randn(4, 4))
    with later.collect() as found:
        choose_linear(CPU, torch.float32, later)(torch.randn(3, 4), 2 * weight, None).sum().backward()
    assert found == []
    assert weight.grad is not None
