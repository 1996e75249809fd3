"""Norms without a test of their own kernel, against their formulas in float64."""

from __future__ import annotations

import pytest
import torch

from megatron.distributed.param_attrs import no_weight_decay
from megatron.registry import NORMS


def x(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64).mul(4).to(dtype)


def test_scalenorm_gives_every_vector_one_length() -> None:
    norm = NORMS.load("scalenorm")(32, 1e-5, True).double()
    assert [name for name, _ in norm.named_parameters()] == ["g"]
    assert no_weight_decay(norm.g)
    with torch.no_grad():
        norm.g.fill_(3.5)
    torch.testing.assert_close(norm(x()), 3.5 * x() / x().pow(2).sum(-1, keepdim=True).sqrt())
    torch.testing.assert_close(norm(x() * 0), x() * 0)  # the smallest length divided by is epsilon
    small = torch.full((1, 32), 1e-9, dtype=torch.float64)
    torch.testing.assert_close(norm(small), 3.5 * small / 1e-5)


def test_non_parametric_layernorm_holds_nothing() -> None:
    norm = NORMS.load("non_parametric_layernorm")(32, 1e-5, True)
    assert list(norm.parameters()) == []
    centred = x() - x().mean(-1, keepdim=True)
    torch.testing.assert_close(norm(x()), centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt())


@pytest.mark.parametrize("name", ["scalenorm", "non_parametric_layernorm", "layernorm", "rmsnorm"])
def test_low_precision_stays_near(name: str) -> None:
    """bf16 keeps 8 bits; lengths and variances are taken in fp32."""
    norm = NORMS.load(name)(32, 1e-5, True)
    wide = norm(x(torch.float32))
    low = norm.to(torch.bfloat16)(x(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    assert (low.float() - wide).abs().max() < 0.02 * wide.abs().max()
