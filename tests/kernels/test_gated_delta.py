"""The gated delta rule in chunks: the recurrence in float64, the public formula, and the gradients of both.

A wrong decay inside a chunk, a state that a later document sees, padding that changes a state, or a term of a gradient
that is left out breaks these.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from megatron.kernels.flash_linear_attention import choose_gated_delta, fla_unavailable, fused_gated_delta
from megatron.kernels.gated_delta import CHUNK, DeltaInputs, gated_delta, gated_delta_loop

LENGTH = 2 * CHUNK + 22
CUTS = ((10, CHUNK, 100), (CHUNK - 1, 2 * CHUNK, LENGTH - 1))
"""Where documents of each row start, beside the first one."""


def inputs(length: int = LENGTH, heads: int = 2, ratio: int = 3, dtype: torch.dtype = torch.float64) -> DeltaInputs:
    draws = torch.Generator().manual_seed(length + ratio)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, length, *shape, dtype=torch.float64, generator=draws)

    q, k = (torch.nn.functional.normalize(normal(heads, 16), dim=-1) for _ in range(2))
    decay = -torch.nn.functional.softplus(2 * normal(heads * ratio))
    values = (q, k, normal(heads * ratio, 8), decay, normal(heads * ratio).sigmoid())
    return DeltaInputs(*(value.to(dtype).requires_grad_() for value in values))


def parts(x: DeltaInputs) -> list[Tensor]:
    return [x.q, x.k, x.v, x.decay, x.strength]


def starts(first: int = 0) -> Tensor:
    found = torch.full((2, LENGTH), first)
    for row, cuts in enumerate(CUTS):
        for cut in cuts:
            found[row, cut:] = cut
    return found


def padding() -> Tensor:
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[0, CHUNK + 3 :] = False
    return valid


CASES: dict[str, tuple[Tensor | None, Tensor | None]] = {
    "one document": (None, None),
    "documents": (starts(), None),
    "documents, the first from before": (starts(-7), None),
    "padded rows": (None, padding()),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [LENGTH, 3])
def test_chunks_are_the_recurrence(case: str, length: int) -> None:
    first, valid = (None if value is None else value[:, :length] for value in CASES[case])
    x = inputs(length)
    state = torch.randn(2, 6, 16, 8, dtype=torch.float64, requires_grad=True)
    found, expected = gated_delta(x, state, first, valid), gated_delta_loop(x, state, first, valid)
    seen = torch.ones(2, length, dtype=torch.bool) if valid is None else valid
    torch.testing.assert_close(found[0][seen], expected[0][seen], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(expected[0]) * seen[..., None, None], torch.randn_like(expected[1])
    grads = [
        torch.autograd.grad(
            sum((part * weight).sum() for part, weight in zip(of, weights, strict=True)), [*parts(x), state]
        )
        for of in (found, expected)
    ]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ratio", [1, 3])
def test_it_is_the_public_formula(ratio: int) -> None:
    """Theirs is in fp32 and divides queries by the root of their width."""
    x = inputs(ratio=ratio, dtype=torch.float32)
    theirs, last = torch_chunk_gated_delta_rule(*parts(x), output_final_state=True)
    found, state = gated_delta(x)
    torch.testing.assert_close(found / 4, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(theirs)
    grads = [torch.autograd.grad((y * weight).sum(), parts(x)) for y in (found / 4, theirs)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_large_decays_and_equal_keys_stay_finite() -> None:
    x = inputs(dtype=torch.float32)
    given = DeltaInputs(x.q, x.k[:, :1].expand_as(x.k), x.v, 200 * x.decay, torch.ones_like(x.strength))
    y, state = gated_delta(given)
    for value in (y, state, *torch.autograd.grad(y.sum() + state.sum(), parts(x)[:4], allow_unused=True)):
        assert value.isfinite().all()


def test_the_package_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interface, in front of the public formula: as many key heads as value heads, decays in fp32."""

    def chunk_gated_delta_rule(*given: Tensor, scale: float, initial_state: Any, output_final_state: bool) -> Any:
        q, k, v, g, beta = given
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert g.dtype == torch.float32
        assert {part.dtype for part in (q, k, beta)} == {v.dtype}
        y, last = torch_chunk_gated_delta_rule(q, k, v, g, beta, initial_state=initial_state, output_final_state=True)
        return y * scale * q.shape[-1] ** 0.5, last

    package = ModuleType("fla.ops.gated_delta_rule")
    package.chunk_gated_delta_rule = chunk_gated_delta_rule  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    x = inputs(dtype=torch.float32)
    for first, valid in CASES.values():
        found, expected = fused_gated_delta(x, None, first, valid), gated_delta(x, None, first, valid)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_the_package_is_for_gpus_and_named_where_it_lacks() -> None:
    assert choose_gated_delta(torch.device("cpu"), fused=True) is gated_delta
    assert "are for CUDA" in (fla_unavailable(torch.device("cpu")) or "")
    assert "pip install neox[linear-attention]" in (fla_unavailable(torch.device("cuda")) or "")
