"""A bound of the scores, softcap * tanh(score / softcap), in every kernel that has it; the others say so."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.kernels import flash_attention as flash
from megatron.kernels import softmax_attention as memory
from megatron.kernels.attention import cpu_attention, masked_attention, plain_attention, sdpa_attention
from megatron.kernels.attention_patterns import AttentionMask, Window, window_for_package
from megatron.kernels.blocked_attention import blocked_attention
from megatron.kernels.cpp_attention import cpp_attention_unavailable
from megatron.kernels.flex_attention import flex_attention
from megatron.registry.attention import ATTENTION_BACKENDS
from tests.kernels.flash_package import FlashPackage, attend
from tests.kernels.test_attention_backends import HOPPER
from tests.kernels.test_flash_attention import PACKAGES, alibi, inputs, starts_of

CAP = 1.5
VIEWS = {
    "causal": AttentionMask(softcap=CAP),
    "window": AttentionMask(Window(5), softcap=CAP),
    "alibi": replace(alibi(), softcap=CAP),
}


def blocks(q: Tensor, k: Tensor, v: Tensor, _: float, starts: Tensor | None, view: AttentionMask) -> Tensor:
    return blocked_attention(q, k, v, starts, view)


KERNELS: dict[str, Any] = {"plain": plain_attention, "sdpa": sdpa_attention, "cpu": cpu_attention, "blocks": blocks}


def formula(q: Tensor, k: Tensor, v: Tensor, view: AttentionMask) -> Tensor:
    """Each row in the stand-in's written-out arithmetic."""
    width = view.pattern.width if isinstance(view.pattern, Window) else None
    window = (-1, -1) if width is None else (width - 1, 0)
    rows = [
        attend(*(x.transpose(0, 1) for x in row), causal=True, window=window, slopes=view.slopes, softcap=CAP)
        for row in zip(q, k, v, strict=True)
    ]
    return torch.stack(rows).transpose(1, 2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", VIEWS)
def test_values_and_gradients_are_the_formula_s(name: str, kernel: str) -> None:
    parts, grad = inputs(2)
    expected = formula(*parts, VIEWS[name])
    found = KERNELS[kernel](*parts, 0.0, None, VIEWS[name])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, KERNELS[kernel](*parts, 0.0, None, replace(VIEWS[name], softcap=None)), atol=1e-2)
    grads = [torch.autograd.grad(out, parts, grad) for out in (found, expected)]
    for got, right in zip(*grads, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "alibi"])
def test_cached_rows_are_bounded_before_a_mask_is_added(name: str) -> None:
    """The cache hides keys by a bool mask, and by a float one where positions add to the scores."""
    parts, view = [part.detach() for part in inputs(2)[0]], VIEWS[name]
    length = parts[0].shape[2]
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]  # [s, keys]
    mask = distance <= 0
    if view.slopes is not None:
        mask = (view.slopes[:, None, None] * distance).masked_fill(~mask, -torch.inf)[None]
    found = masked_attention(*parts, mask, view)
    torch.testing.assert_close(found, formula(*parts, view), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VIEWS)
def test_flexible_attention_bounds_before_it_adds_a_bias(name: str) -> None:
    parts = [part.detach() for part in inputs(2)[0]]
    found = flex_attention(*parts, None, VIEWS[name])
    torch.testing.assert_close(found, formula(*parts, VIEWS[name]), rtol=1e-6, atol=1e-6)


def test_scores_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever makes the probabilities of them; on a GPU that is Triton's softmax."""

    def softmax(scores: Tensor, scale: float) -> Tensor:
        shown = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return (scores * scale).masked_fill(~shown, float("-inf")).softmax(-1)

    monkeypatch.setattr(memory, "causal_softmax", softmax)
    parts, _ = inputs(2)
    found = memory.softmax_attention(*parts, 0.0, None, VIEWS["causal"])
    torch.testing.assert_close(found, formula(*parts, VIEWS["causal"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("version", PACKAGES)
def test_every_package_gets_the_bound(version: int, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    package = FlashPackage(version)
    for name, module in package.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    starts = starts_of(((5, 19), (24,))) if documents else None
    parts, _ = inputs(2)
    for view in (VIEWS["causal"], VIEWS["window"]):
        found = PACKAGES[version](*parts, 0.0, starts, view)
        torch.testing.assert_close(found, plain_attention(*parts, 0.0, starts, view), rtol=1e-4, atol=1e-5)
        assert package.calls[-1][1]["softcap"] == CAP
    PACKAGES[version](*parts, 0.0, starts, AttentionMask(Window(5)))
    assert "softcap" not in package.calls[-1][1]


def test_what_lacks_it_says_so() -> None:
    q = torch.zeros(2, 4, 8, 16)
    assert cpp_attention_unavailable(q, q, VIEWS["causal"]) is None
    assert window_for_package(None, VIEWS["window"]) is None
    reasons = {entry.name: entry.unavailable(replace(HOPPER, softcap=True)) for entry in ATTENTION_BACKENDS}
    lacking = {name for name, reason in reasons.items() if "softcap" in (reason or "")}
    assert {"torch flash", "torch varlen"} <= lacking
    assert reasons["flash-attn 3"] is None and reasons["flash-attn 2"] is None and reasons["flex"] is None
    assert not lacking & {"triton softmax", "flash-attn 4", "torch", "cpu blocks"}


def test_torchs_varlen_kernel_leaves_it_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[Any] = []
    monkeypatch.setattr(flash, "gpu_attention", lambda *args: others.append(args[5]) or plain_attention(*args))
    flash.varlen_attention(*inputs(1)[0], 0.0, None, VIEWS["causal"])
    assert others == [VIEWS["causal"]]
