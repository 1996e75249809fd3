"""What only a GPU runs: compiled flexible attention, the flash-attn package, Transformer Engine's norms."""

from __future__ import annotations

import pytest
import torch

from megatron.block_sparsity import SPARSE_KINDS, layout_of
from megatron.kernels.attention import gpu_attention, plain_attention
from megatron.kernels.attention_patterns import AttentionMask, BlockPattern, Window
from megatron.kernels.flash_attention import choose_flash
from megatron.registry import NORMS

pytestmark = pytest.mark.gpu
HEADS, KV_HEADS, LENGTH, SIZE = 8, 4, 700, 64


def inputs(dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, HEADS, LENGTH, SIZE), (2, KV_HEADS, LENGTH, SIZE), (2, KV_HEADS, LENGTH, SIZE)]
    made = [torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_() for shape in shapes]
    return made, torch.randn(shapes[0], generator=generator).to("cuda", dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ["window", *SPARSE_KINDS])
def test_flexible_attention_is_plain_attention(name: str, biased: bool) -> None:
    """Values and gradients, a learned bias's too, in bf16: 2 % of the largest value."""
    layout = layout_of(name, {"block": 16, "different_layout_per_head": name != "local"}, 1)
    pattern = Window(100) if layout is None else BlockPattern(layout, range(HEADS))
    results = []
    for kernel in (gpu_attention, plain_attention):
        parts, grad = inputs(torch.bfloat16)
        bias = torch.linspace(0, -4, LENGTH, device="cuda").expand(HEADS, -1).clone().requires_grad_()
        used = [*parts, bias] if biased else parts
        out = kernel(*parts, 0.0, None, AttentionMask(pattern, bias if biased else None))
        results.append([out, *torch.autograd.grad(out, used, grad)])
    for got, want in zip(*results, strict=True):
        assert (got.float() - want.float()).abs().max() < 0.02 * want.float().abs().max()


def test_flash_attn_is_plain_attention() -> None:
    pytest.importorskip("flash_attn")
    for window in (None, Window(100)):
        parts, _ = inputs(torch.bfloat16)
        view = None if window is None else AttentionMask(window)
        out = choose_flash(torch.device("cuda"), torch.bfloat16)(*parts, 0.0, None, view)
        want = plain_attention(*parts, 0.0, None, view)
        assert (out.float() - want.float()).abs().max() < 0.02 * want.float().abs().max()


@pytest.mark.parametrize(("theirs", "ours"), [("te_layernorm", "layernorm"), ("te_rmsnorm", "rmsnorm")])
def test_transformer_engines_norms_are_ours(theirs: str, ours: str) -> None:
    pytest.importorskip("transformer_engine")
    with torch.device("cuda"):
        first, second = (NORMS.load(name)(256, 1e-5, True) for name in (theirs, ours))
        x = torch.randn(7, 3, 256)
    torch.testing.assert_close(first(x), second(x), rtol=1e-4, atol=1e-5)
