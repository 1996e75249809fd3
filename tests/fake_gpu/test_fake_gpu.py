"""Models on a fake GPU: no tensor is left on the CPU, and nothing makes the host wait for a value.

Not seen here: what real kernels support, memory, streams, torch.compile and collectives.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MODELS = (
    "quickstart",
    "llama",
    "tied",
    "experts",
    "mamba",
    "mamba2",
    "alibi",
    "documents",
    "documents by flash-attn",
    "windows",
    "sparse",
    "softmax",
    "recomputed attention",
    "recomputed blocks",
    "fp8 tensorwise",
    "fp8 rowwise",
    "fp8 blockwise",
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The outcomes of all models, from one process in which the fake GPU is there before torch."""
    command = [sys.executable, "-m", "tests.fake_gpu.models"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


@pytest.mark.parametrize("model", MODELS)
def test_a_step_stays_on_the_gpu_and_the_host_never_waits(model: str, found: dict[str, Any]) -> None:
    assert found["outcomes"][model] is None


def test_planted_bugs_are_errors(found: dict[str, Any]) -> None:
    errors = {name: error for name, error in found["outcomes"].items() if name.startswith("planted")}
    assert "DataDependentOutputException" in errors["planted: the host reads a value"]
    assert "DynamicOutputShapeException" in errors["planted: offsets are read from the GPU"]
    assert "FakeTensorDeviceMismatchError" in errors["planted: a tensor on the CPU"]
    assert set(found["outcomes"]) == {*MODELS, *errors}


def test_the_fused_kernels_serve(found: dict[str, Any]) -> None:
    assert {"norm_backward", "activation_backward", "rotate", "softmax_gradient", "bias_dropout_residual"} <= set(
        found["launched"]
    )
    assert {"softmax_forward", "softmax_backward"} <= set(found["launched"])
    assert {"gather_rows", "sum_rows", "row_products"} <= set(found["launched"])


def test_a_fused_block_starts_less_than_half_the_kernels_of_transformers(found: dict[str, Any]) -> None:
    """Forward and backward of a Llama block of one shape; attention is one kernel each way on both sides with sdpa."""
    counts = found["launches of a block"]
    assert counts["ours"] <= 0.5 * counts["sdpa"] < counts["eager"]
