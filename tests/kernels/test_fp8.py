"""Products in FP8: rounding as written in the formats, against float64, and the products of layers."""

import itertools

import pytest
import torch

from megatron.kernels.fp8 import fp8_linear, fp8_product, quantize
from megatron.registry.fp8 import FP8_RECIPES, ScaleSharing

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BITS = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}
"""Format -> bits of the mantissa, least exponent of a normal number, largest number."""
RECIPES = sorted(FP8_RECIPES)


def rounded(x, dtype):
    """The nearest numbers of the format, ties to even, in float64."""
    mantissa, least, _ = BITS[dtype]
    exponent = torch.floor(torch.log2(x.abs().clamp_min(1e-300))).clamp_min(least)
    step = torch.exp2(exponent - mantissa)
    return torch.round(x / step) * step


def sharers(x, sharing):
    """The largest absolute value among those that share each one's scale, [rows, summed]."""
    rows, summed = x.shape
    most = x.abs()
    if sharing is ScaleSharing.TENSOR:
        return most.max().expand(rows, summed)
    if sharing is ScaleSharing.ROW:
        return most.amax(1, keepdim=True).expand(rows, summed)
    high = 128 if sharing is ScaleSharing.BLOCK else 1
    out = torch.empty_like(x)
    for row, column in itertools.product(range(0, rows, high), range(0, summed, 128)):
        part = slice(row, row + high), slice(column, column + 128)
        out[part] = most[part].max()
    return out


def reference(x, sharing, dtype, *, power_of_two=False):
    """The operand that a product sees, in float64. x: float64 of fp32 values."""
    scale = (sharers(x, sharing).float() / torch.tensor(BITS[dtype][2])).double()
    scale[scale == 0] = 1
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return rounded((x.float() / scale.float()).double(), dtype) * scale


def spread(rows, columns, seed=0):
    """Values over many magnitudes, a row of zeros among them."""
    torch.manual_seed(seed)
    x = torch.randn(rows, columns, dtype=torch.float64) * torch.exp2(torch.randint(-12, 6, (rows, columns)))
    x[rows // 2] = 0
    return x.float().double()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("sharing", list(ScaleSharing))
def test_operands_are_rounded_as_the_format_says(sharing, dtype, power_of_two):
    x = spread(256, 384)
    found = quantize(x.float(), sharing, dtype, power_of_two=power_of_two)
    assert found.values.dtype == dtype and found.values.shape == x.shape
    expected = reference(x, sharing, dtype, power_of_two=power_of_two)
    assert torch.allclose(found.widened().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sharing", list(ScaleSharing))
def test_powers_of_two_are_exact(sharing):
    x = torch.exp2(torch.randint(-3, 4, (128, 128)).float())
    assert torch.equal(quantize(x, sharing, E4M3, power_of_two=True).widened(), x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value):
    x = torch.randn(128, 256)
    x[3, 5] = value
    seen = quantize(x, ScaleSharing.TILE, E4M3).widened()
    assert not seen[3, :128].isfinite().any() and seen[3, 128:].isfinite().all() and seen[4].isfinite().all()


@pytest.mark.parametrize("sharing", [ScaleSharing.TENSOR, ScaleSharing.ROW])
def test_the_product_is_that_of_torch(sharing):
    a, b = quantize(spread(48, 64).float(), sharing, E4M3), quantize(spread(32, 64, 1).float(), sharing, E4M3)
    scales = (a.scale, b.scale if sharing is ScaleSharing.TENSOR else b.scale.t())
    theirs = torch._scaled_mm(a.values, b.values.t(), *scales, out_dtype=torch.bfloat16)
    assert torch.allclose(fp8_product(a, b, None, torch.bfloat16).float(), theirs.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_and_its_gradients(recipe):
    """Every product of the rounded operands, in float64."""
    facts = FP8_RECIPES[recipe]
    gradient = getattr(torch, facts.gradient_format)
    x, weight, grad = spread(256, 384), spread(128, 384, 1), spread(256, 128, 2)
    bias = torch.randn(128)
    inputs = [each.float().requires_grad_() for each in (x, weight)]
    own_bias = bias.clone().requires_grad_()
    y = fp8_linear(facts)(inputs[0].view(2, 128, 384), inputs[1], own_bias)
    y.backward(grad.float().view(2, 128, 128))

    def seen(value, sharing, dtype=E4M3):
        return reference(value, sharing, dtype, power_of_two=facts.power_of_two)

    values, weights = facts.values, facts.weights
    expected = seen(x, values) @ seen(weight, weights).t() + bias.double()
    grad_x = seen(grad, values, gradient) @ seen(weight.t(), weights).t()
    grad_weight = seen(grad.t(), values, gradient) @ seen(x.t(), values).t()
    for found, right in (
        (y.view(256, 128), expected),
        (inputs[0].grad, grad_x),
        (inputs[1].grad, grad_weight),
        (own_bias.grad, grad.sum(0)),
    ):
        assert (found.double() - right).abs().max() <= 1e-5 * right.abs().max()
