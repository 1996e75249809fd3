"""The oneDNN product against torch's own in float64, forward and backward, and when it is chosen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.kernels import cpu_features, grouped_matmul, linear
from megatron.kernels import packed_linear as packed_linear_module
from megatron.kernels.linear import choose_linear, onednn_linear, onednn_unavailable, plain_linear, widened_linear
from megatron.kernels.packed_linear import (
    few_rows_linear,
    few_rows_unavailable,
    packed_linear,
    packing_unavailable,
    panel_linear,
    panels_unavailable,
)

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


@pytest.mark.parametrize("kernel", [plain_linear, widened_linear])
def test_bfloat16_rounds_once(kernel: object) -> None:
    """Of exact products and sums in fp32 only the result is rounded, to 8 bits; sums of 64 terms add little."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 3, 64), (96, 64), (96,)]
    low = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    grad = torch.randn(7, 3, 96, generator=generator).bfloat16()
    actual, expected = kernel(*low), F.linear(*exact)  # type: ignore[operator]
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(actual, low, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("supported", [True, False])
def test_a_processor_without_bfloat16_multiplies_in_fp32(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert cpu_features.needs_fp32_matmul(CPU, torch.bfloat16) is not supported
    assert not cpu_features.needs_fp32_matmul(CPU, torch.float32)
    assert not cpu_features.needs_fp32_matmul(torch.device("cuda"), torch.bfloat16)
    assert choose_linear(CPU, torch.bfloat16) is (plain_linear if supported else widened_linear)


def test_widened_groups_round_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, matrices, counts = torch.randn(9, 32), torch.randn(3, 32, 16), torch.tensor([4, 0, 5])
    monkeypatch.setattr(grouped_matmul, "needs_fp32_matmul", lambda device, dtype: dtype == torch.bfloat16)
    low = [rows.bfloat16().requires_grad_(), matrices.bfloat16().requires_grad_()]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    got, target = grouped_matmul.plain_grouped(*low, counts), grouped_matmul.plain_grouped(*exact, counts)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), target, rtol=2**-8, atol=1e-5)
    grad = torch.randn(9, 16).bfloat16()
    for some, others in zip(
        torch.autograd.grad(got, low, grad), torch.autograd.grad(target, exact, grad.double()), strict=True
    ):
        torch.testing.assert_close(some.double(), others, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("rank", [3, 8])
def test_updates_of_groups_by_the_fused_kernel(rank: int) -> None:
    """Of a rank that the kernel takes and of one that it does not; A is stored as its transpose, as are both B."""
    shapes, counts, scale = [(9, 32), (3, rank, 32), (3, 16, rank), (3, 16, rank)], torch.tensor([4, 0, 5]), 1.5
    draws = torch.Generator().manual_seed(1)
    low = [torch.randn(shape, generator=draws).bfloat16().requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    grads = [torch.randn(9, 16, generator=draws).bfloat16() for _ in range(2)]
    results = []
    for (rows, *factors), product in ((low, grouped_matmul.fused_grouped), (exact, grouped_matmul.plain_grouped)):
        turned = tuple(factor.transpose(1, 2) for factor in factors)
        found = grouped_matmul.low_rank_grouped(product, rows, turned, counts, scale)
        outer = [grad.to(rows.dtype) for grad in grads]
        results.append((found, torch.autograd.grad(found, (rows, *factors), outer)))
    group = exact[0][4:]
    expected = [scale * group @ exact[1][2].T @ up[2].T for up in exact[2:]]
    for some, others in zip(results[1][0], expected, strict=True):
        torch.testing.assert_close(some[4:], others)
    for some, others in zip((*results[0][0], *results[0][1]), (*results[1][0], *results[1][1]), strict=True):
        assert some.dtype == torch.bfloat16
        torch.testing.assert_close(some.double(), others, rtol=2**-6, atol=0.3)


def test_the_choice_is_reported_as_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "needs_fp32_matmul", lambda device, dtype: False)
    assert onednn_unavailable(CPU, torch.float32) is None
    assert choose_linear(CPU, torch.float32) is onednn_linear
    for device, dtype, word in ((CPU, torch.bfloat16, "bfloat16"), (torch.device("cuda"), torch.float32, "cuda")):
        sentence = onednn_unavailable(device, dtype)
        assert sentence is not None
        assert word in sentence
        assert sentence.endswith(".")
        assert choose_linear(device, dtype) is plain_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_weights_give_the_same_product(dtype: torch.dtype, bias: bool) -> None:
    """On any processor; one without bfloat16 keeps such weights in fp32."""
    weight, x, added = (torch.randn(shape).to(dtype) for shape in ((96, 64), (3, 5, 64), (96,)))
    assert packing_unavailable(weight) is None
    packed = packed_linear(weight)
    got = packed(x, torch.empty(0), added if bias else None)
    assert got.dtype == dtype
    target = F.linear(x.double(), weight.double(), added.double() if bias else None)
    torch.testing.assert_close(got.double(), target, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 16, 17])
@pytest.mark.parametrize(("out", "width"), [(96, 64), (51, 48), (3, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_of_bfloat16_are_rounded_once(rows: int, out: int, width: int, bias: bool) -> None:
    """The compiled loop beside float64, within half a unit of the last place of bfloat16."""
    weight, x, added = (torch.randn(shape).bfloat16() for shape in ((out, width), (rows, 1, width), (out,)))
    assert few_rows_unavailable(weight) is None
    got = few_rows_linear(weight)(x, torch.empty(0), added if bias else None)
    target = F.linear(x.double(), weight.double(), added.double() if bias else None)
    assert got.shape == (rows, 1, out)
    torch.testing.assert_close(got.double(), target, rtol=2**-8, atol=1e-5)


def test_what_the_compiled_product_cannot_take_is_reported() -> None:
    for weight in (torch.randn(8, 16), torch.randn(8, 24).bfloat16(), torch.randn(16, 16).bfloat16().t()[:, ::2]):
        sentence = few_rows_unavailable(weight)
        assert sentence is not None
        assert sentence.endswith(".")


def test_without_a_compiler_bfloat16_is_packed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear_module, "library", lambda: "There is none.")
    monkeypatch.setattr(packed_linear_module, "needs_fp32_matmul", lambda _device, dtype: dtype == torch.bfloat16)
    weight, x = torch.randn(96, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    target = F.linear(x.double(), weight.double())
    torch.testing.assert_close(packed_linear(weight)(x, weight, None).double(), target, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "width"), [(1, 1), (8, 16), (13, 35), (48, 7), (129, 64)])
def test_panels_give_the_product_of_float64(out: int, width: int, bias: bool) -> None:
    """For every number of rows that a tile may have, and for many rows, strided ones and none."""
    generator = torch.Generator().manual_seed(out)
    weight, added = torch.randn(out, width, generator=generator), torch.randn(out, generator=generator)
    kernel = panel_linear(weight)
    for rows in (*range(15), 24, 100):
        x = torch.randn(rows, 2, width, generator=generator)[:, 1]
        expected = F.linear(x.double(), weight.double(), added.double() if bias else None)
        found = kernel(x, torch.empty(0), added if bias else None)
        assert found.shape == (rows, out)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_threads_change_no_bit_of_panels() -> None:
    kernel, x = panel_linear(torch.randn(100, 64)), torch.randn(9, 64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(kernel(x, torch.empty(0), None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])


def test_panels_are_for_processors_without_avx_512(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 8)
    for capability, chosen in (("AVX2", True), ("AVX512", False), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        assert (panels_unavailable(weight) is None) == chosen
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "not torch.bfloat16" in (panels_unavailable(weight.bfloat16()) or "")
    monkeypatch.setattr(packed_linear_module, "library", lambda: "There is none.")
    assert panels_unavailable(weight) == "There is none."
