"""The oneDNN product against torch's own in float64, forward and backward, and when it is chosen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.kernels.linear import choose_linear, onednn_linear, onednn_unavailable, plain_linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("kernel", [plain_linear, onednn_linear])
@pytest.mark.parametrize(("width", "out"), [(32, 96), (96, 32), (32, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(kernel: object, width: int, out: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 3, width), (out, width), (out,)][: 3 if bias else 2]
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    grad = torch.randn(7, 3, out, generator=generator, dtype=torch.float64)
    expected = F.linear(*exact)
    expected_grads = torch.autograd.grad(expected, exact, grad)
    single = [tensor.detach().float().requires_grad_() for tensor in exact]
    actual = kernel(*single, *([] if bias else [None]))  # type: ignore[operator]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(torch.autograd.grad(actual, single, grad.float()), expected_grads, strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_strided_inputs_and_gradients() -> None:
    x = torch.randn(3, 7, 32).transpose(0, 1).requires_grad_()
    weight = torch.randn(16, 32, requires_grad=True)
    grad = torch.randn(3, 7, 16).transpose(0, 1)
    actual = torch.autograd.grad(onednn_linear(x, weight, None), (x, weight), grad)
    expected = torch.autograd.grad(F.linear(x, weight), (x, weight), grad)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_frozen_weight_costs_no_gradient() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8)
    onednn_linear(x, weight, None).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 8))


def test_the_choice_is_told_as_a_sentence() -> None:
    assert onednn_unavailable(CPU, torch.float32) is None
    assert choose_linear(CPU, torch.float32) is onednn_linear
    for device, dtype, word in ((CPU, torch.bfloat16, "bfloat16"), (torch.device("cuda"), torch.float32, "cuda")):
        sentence = onednn_unavailable(device, dtype)
        assert sentence is not None
        assert word in sentence
        assert sentence.endswith(".")
        assert choose_linear(device, dtype) is plain_linear
