"""Products in FP8 on a GPU: those of the same 8-bit numbers in fp32, and a run near that in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.kernels.fp8 import fp8_linear
from megatron.registry.fp8 import FP8_RECIPES
from tests.end_to_end.runs import make_dataset, run, series

pytestmark = pytest.mark.gpu
MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "seq_length": 128,
    "max_position_embeddings": 128,
    "precision": "bfloat16",
    "zero_optimization": {"stage": 1},
}


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_the_products_are_those_of_the_same_numbers(recipe: str) -> None:
    """The GPU rounds its sums to bfloat16 and adds in another order, with fewer bits within a product's block."""
    torch.manual_seed(0)
    ops = fp8_linear(FP8_RECIPES[recipe]).ops
    x, weight, grad = (torch.randn(*shape).bfloat16() for shape in ((512, 384), (256, 384), (512, 256)))
    usual = (ops.product(x, weight, None), ops.input_gradient(grad, weight), ops.weight_gradient(grad, x))
    x, weight, grad = (each.cuda() for each in (x, weight, grad))
    found = (ops.product(x, weight, None), ops.input_gradient(grad, weight), ops.weight_gradient(grad, x))
    for right, ours in zip(usual, found, strict=True):
        assert (ours.cpu().float() - right.float()).abs().max() < 0.01 * right.float().abs().max()


@pytest.mark.parametrize("recipe", FP8_RECIPES)
@pytest.mark.parametrize("compiled", [False, True])
def test_it_learns_as_bfloat16_does(recipe: str, compiled: bool, tmp_path: Path) -> None:
    data = make_dataset(tmp_path)
    usual = run(1, tmp_path / "usual", backend="nccl", data_path=data, **MODEL)
    found = run(1, tmp_path / "fp8", backend="nccl", data_path=data, fp8={"recipe": recipe}, compile=compiled, **MODEL)
    losses = series(found, "train/lm_loss")
    assert losses == pytest.approx(series(usual, "train/lm_loss"), abs=0.1)
    assert losses[-1] < losses[0] - 0.5
