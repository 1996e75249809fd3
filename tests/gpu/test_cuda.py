"""What changes on a GPU: the device, NCCL, torch's own attention kernels. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.kernels.attention import any_attention, plain_attention
from megatron.kernels.grouped_matmul import fused_grouped, grouped_unavailable, plain_grouped
from megatron.kernels.mamba import choose_mamba, fused_convolution, fused_scan, plain_convolution, plain_scan
from tests.end_to_end.runs import run, series

pytestmark = pytest.mark.gpu


def test_fp32_training_equals_the_cpu(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same initial weights and data; the sums are in another order. TF32 is off by default."""
    there = run(1, tmp_path / "gpu", data_path=dataset, backend="nccl")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    here = run(1, tmp_path / "cpu", data_path=dataset)
    assert series(there, "train/lm_loss") == pytest.approx(series(here, "train/lm_loss"), rel=1e-4)
    assert series(there, "train/grad_norm") == pytest.approx(series(here, "train/grad_norm"), rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_training_learns(stage: int, dataset: str, tmp_path: Path) -> None:
    settings = {"precision": "bfloat16", "zero_optimization": {"stage": stage}}
    losses = series(run(1, tmp_path, data_path=dataset, backend="nccl", **settings), "train/lm_loss")
    assert losses[-1] < losses[0] - 1.0


def test_deterministic_runs_are_bitwise_equal(dataset: str, tmp_path: Path) -> None:
    settings = {"precision": "bfloat16", "zero_optimization": {"stage": 1}, "deterministic": True}
    first, second = (
        run(1, tmp_path / name, data_path=dataset, backend="nccl", **settings) for name in ("first", "second")
    )
    assert series(first, "train/lm_loss") == series(second, "train/lm_loss")


def test_a_resumed_run_is_the_run_that_was_not_stopped(dataset: str, tmp_path: Path) -> None:
    settings = {
        "precision": "bfloat16",
        "zero_optimization": {"stage": 1},
        "hidden_dropout": 0.1,
        "deterministic": True,
    }
    full = run(1, tmp_path / "whole", data_path=dataset, backend="nccl", **settings)
    save = str(tmp_path / "save")
    parts = {"data_path": dataset, "save": save, "load": save, "checkpoint_factor": 100, "backend": "nccl", **settings}
    run(1, tmp_path / "parts", exit_interval=10, **parts)
    assert series(run(1, tmp_path / "parts", **parts), "train/lm_loss") == series(full, "train/lm_loss")


def test_compiled_blocks_learn_the_same(dataset: str, tmp_path: Path) -> None:
    """In bfloat16 over 20 steps, within 0.02 nats."""
    settings = {"precision": "bfloat16", "zero_optimization": {"stage": 1}, "data_path": dataset, "backend": "nccl"}
    plain, compiled = (
        series(run(1, tmp_path / str(compiled), compile=compiled, **settings), "train/lm_loss")
        for compiled in (False, True)
    )
    assert compiled == pytest.approx(plain, abs=0.02)


@pytest.mark.parametrize(("heads", "kv_heads", "queries", "keys"), [(8, 8, 256, 256), (8, 2, 256, 256), (8, 2, 1, 77)])
def test_attention_equals_the_plain_twin(heads: int, kv_heads: int, queries: int, keys: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(count: int, length: int) -> torch.Tensor:
        shape = (2, count, length, 64)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()

    q, k, v = draw(heads, queries), draw(kv_heads, keys), draw(kv_heads, keys)
    actual = any_attention(torch.device("cuda"))(q, k, v, 0.0)
    expected = plain_attention(*(part.detach().double() for part in (q, k, v)), 0.0)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(actual)
    exact = [part.detach().double().requires_grad_() for part in (q, k, v)]
    target = torch.autograd.grad(plain_attention(*exact, 0.0), exact, grad.double())
    for got, want in zip(torch.autograd.grad(actual, (q, k, v), grad), target, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=5e-2, atol=5e-2)


def test_the_grouped_product_is_the_plain_one() -> None:
    """Forward and backward in bfloat16, with an empty group; one rounding apart."""
    device = torch.device("cuda")
    assert grouped_unavailable(device, torch.bfloat16) is None
    counts = torch.tensor([64, 0, 128, 32], device=device)
    found = []
    for product in (plain_grouped, fused_grouped):
        torch.manual_seed(1)
        rows = torch.randn(224, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        matrices = torch.randn(4, 64, 96, device=device, dtype=torch.bfloat16, requires_grad=True)
        out = product(rows, matrices, counts)
        out.float().square().sum().backward()
        found.append((out, rows.grad, matrices.grad))
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=2e-2, atol=2e-2 * plain.abs().max().item())


def test_spread_experts_train(dataset: str, tmp_path: Path) -> None:
    settings = {"precision": "bfloat16", "zero_optimization": {"stage": 1}, "moe_num_experts": 4, "moe_top_k": 2}
    settings |= {"moe_router_type": "topk", "moe_aux_loss_coeff": 0.01}
    losses = series(run(1, tmp_path, data_path=dataset, backend="nccl", **settings), "train/lm_loss")
    assert losses[-1] < losses[0] - 1.0


def test_the_fused_kernels_of_mamba_are_the_plain_ones() -> None:
    """Forward and backward in fp32; needs the extra `mamba`."""
    chosen = choose_mamba(torch.device("cuda"), convolution=True, scan=True)
    assert (chosen.convolution, chosen.scan) == (fused_convolution, fused_scan)
    found = []
    for convolution, scan in ((plain_convolution, plain_scan), (fused_convolution, fused_scan)):
        torch.manual_seed(1)
        shapes = [(2, 128, 64), (64, 4), (64,), (2, 128, 64), (64, 16), (2, 128, 16), (2, 128, 16), (64,), (64,)]
        inputs = [torch.randn(*shape, device="cuda", requires_grad=True) for shape in (*shapes, (2, 128, 64))]
        x, taps, bias, step, rate, into, out, skip, shift, gate = inputs
        y = scan(convolution(x, taps, bias), step, -rate.exp(), into, out, skip, shift, gate)
        y.square().sum().backward()
        found.append([y, *(value.grad for value in inputs)])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())
