"""The gradient noise scale against gradients whose noise is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.engine.tensor_statistics import NoiseScale


class Tap:
    def __init__(self) -> None:
        self.listeners: list[Any] = []


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_known_noise_is_found(on_cpu: bool, factor: float) -> None:
    """10,000 elements of mean 0.1 and deviation 2 a sample: trace 4e4, square 100, so 400 samples."""
    tap, generator = Tap(), torch.Generator().manual_seed(0)
    scale = NoiseScale(tap, batches=4, on_cpu=on_cpu)  # type: ignore[arg-type]
    part = SimpleNamespace(start=0)
    assert scale.measure() == {}
    for _ in range(400):
        with scale.recording(64):
            gradient = 0.1 + 2.0 / 8 * torch.randn(10_000, generator=generator)
            for listener in tap.listeners:
                listener("a", part, gradient / factor, factor)
    assert scale.measure()["train/gradient_noise_scale"] == pytest.approx(400, rel=0.05)
