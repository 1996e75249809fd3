"""Triton's rotary positions against complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.kernels.triton.rotary import rotary_pair
from tests.kernels.triton.compared import DTYPES, TOLERANCE, random, worst

POSITIONS = 40


def table(rotated: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(POSITIONS).double(), 100.0 ** -torch.arange(0, 1, 2 / rotated).double())
    return angles.cos().float(), angles.sin().float()


def formula(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Complex multiplication by e^(i angle); cos and sin [s, r/2] or [b, 1, s, r/2]."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    product = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos.double(), sin.double())
    out = torch.view_as_real(product)
    out = out if interleaved else out.transpose(-1, -2)
    return torch.cat((out.flatten(-2), rest), dim=-1)


@pytest.mark.parametrize("interleaved", [False, True], ids=("half-split", "interleaved"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize(("width", "rotated"), [(16, 16), (20, 6), (128, 64)])
def test_pairs_are_rotated(
    width: int, rotated: int, heads: tuple[int, int], dtype: torch.dtype, *, interleaved: bool
) -> None:
    cos, sin = table(rotated)
    q, k = random(2, heads[0], 7, width, dtype=dtype), random(2, heads[1], 7, width, dtype=dtype, seed=1)

    def kernel(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return rotary_pair(q, k, cos, sin, 3, interleaved=interleaved)

    def reference(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return tuple(formula(x, cos[3:10], sin[3:10], interleaved=interleaved) for x in (q, k))

    assert worst(kernel, reference, (q, k)) < 2 * TOLERANCE[dtype]


def test_given_positions_and_strided_heads() -> None:
    cos, sin = table(8)
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 30, 31, 32, 39]])
    qkv = random(5, 2, 3 * 4 * 8, dtype=torch.float32)  # [s, b, ...]

    def parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.view(5, 2, 4, 3, 8).unbind(3)
        return q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v

    def kernel(qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = parts(qkv)
        return *rotary_pair(q, k, cos, sin, positions=positions), v

    def reference(qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = parts(qkv)
        c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
        return *(formula(x, c, s, interleaved=False) for x in (q, k)), v

    assert worst(kernel, reference, (qkv,)) < 2e-6


def test_without_a_gradient_it_works_inplace() -> None:
    cos, sin = table(8)
    q, k = torch.randn(1, 2, 3, 12), torch.randn(1, 1, 3, 12)
    expected = [formula(x.double(), cos[:3], sin[:3], interleaved=False).float() for x in (q, k)]
    turned = rotary_pair(q, k, cos, sin)
    assert turned[0].data_ptr() == q.data_ptr()
    assert turned[1].data_ptr() == k.data_ptr()
    for one, other in zip(turned, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_an_empty_sequence() -> None:
    cos, sin = table(8)
    q, k = rotary_pair(torch.randn(1, 2, 0, 8), torch.randn(1, 2, 0, 8), cos, sin)
    assert q.shape == k.shape == (1, 2, 0, 8)
