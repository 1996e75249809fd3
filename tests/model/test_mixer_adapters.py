"""LoRA adapters of blocks without attention are those of plain matrices with the product of the factors added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.model.mixers import build, disturb
from tests.model.sections import VOCABULARY

TARGETED = {
    "rwkv": ["time_mixing", "channel_mixing"],
    "gmlp": ["gmlp"],
    "amlp": ["gmlp"],
    "mamba": ["in_proj", "out_proj"],
    "mamba2": ["in_proj", "out_proj"],
}
MATRICES = {"rwkv": 8, "gmlp": 2, "amlp": 2, "mamba": 2, "mamba2": 2}
"""Targeted matrices of a block."""


@pytest.mark.parametrize("kind", TARGETED)
def test_updates_are_those_of_matrices_with_the_product_added(kind: str) -> None:
    """Logits, and the gradients of A and B, of a model without adapters whose matrices are W + 2 B A."""
    updated = build(kind, lora={"rank": 3, "alpha": 6, "targets": TARGETED[kind]})
    plain = build(kind)
    disturb(updated)
    factors = {name: part for name, part in updated.named_parameters() if ".lora_" in name}
    draws = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for part in factors.values():
            part.copy_(0.2 * torch.randn(part.shape, generator=draws))
        for name, own in plain.named_parameters():
            own.copy_(updated.get_parameter(name))
    modules = {name.partition(".lora_")[0] for name in factors}
    assert len(modules) == 2 * MATRICES[kind]
    joined = {
        f"{one}.weight": plain.get_parameter(f"{one}.weight")
        + 2 * factors[f"{one}.lora_B.weight"] @ factors[f"{one}.lora_A.weight"]
        for one in modules
    }
    ids: Tensor = torch.randint(0, VOCABULARY, (2, 24), generator=draws)
    found = updated(ids)
    expected = torch.func.functional_call(plain, joined, (ids,))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(expected)
    own, theirs = (torch.autograd.grad(out, list(factors.values()), direction) for out in (found, expected))
    for name, mine, other in zip(factors, own, theirs, strict=True):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()), msg=name)
