"""What only a GPU runs: every backend of attention, compiled flexible attention, Transformer Engine's norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron.block_sparsity import SPARSE_KINDS, layout_of
from megatron.kernels.attention import gpu_attention, plain_attention
from megatron.kernels.attention_patterns import AttentionMask, BlockPattern, Window
from megatron.kernels.dispatch import capability_of
from megatron.kernels.documents import DocumentOffsets, attach_offsets
from megatron.model.positions.alibi import slopes
from megatron.registry import NORMS
from megatron.registry.attention import ATTENTION_BACKENDS, FOR_CPUS
from megatron.registry.attention_facts import AttentionFacts
from megatron.registry.kernels import KernelFacts
from megatron.registry.registry import load_target

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


def starts_of(*lengths: int) -> torch.Tensor:
    """Two rows: documents of these lengths, and one document."""
    row = torch.tensor([*lengths, LENGTH - sum(lengths)])
    first = torch.repeat_interleave(row.cumsum(0) - row, row)
    return torch.stack([first, torch.zeros_like(first)]).cuda()


def alibi(pattern: Window | None = None) -> AttentionMask:
    steep = torch.tensor(slopes(HEADS), device="cuda")
    return AttentionMask(pattern, -steep[:, None] * torch.arange(LENGTH, device="cuda"), steep)


# name -> facts besides the GPU's own, documents, view
ASKED: dict[str, tuple[dict[str, object], bool, Callable[[], AttentionMask | None]]] = {
    "causal": ({}, False, lambda: None),
    "deterministic": ({"deterministic": True}, False, lambda: None),
    "window": ({"window": True}, False, lambda: AttentionMask(Window(100))),
    "documents": ({"documents": True}, True, lambda: None),
    "documents, deterministic": ({"documents": True, "deterministic": True}, True, lambda: None),
    "documents in a window": ({"documents": True, "window": True}, True, lambda: AttentionMask(Window(100))),
    "alibi": ({"bias": "linear"}, False, alibi),
    "alibi of documents in a window": (
        {"bias": "linear", "documents": True, "window": True},
        True,
        lambda: alibi(Window(100)),
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_every_backend_of_this_gpu_is_plain_attention(case: str) -> None:
    """Values and gradients in bf16, of all backends that say they can serve: 2 % of the largest value."""
    asked, documents, view_of = ASKED[case]
    facts = AttentionFacts(
        KernelFacts("cuda", "bfloat16"), head_size=SIZE, length=LENGTH, capability=capability_of(torch.device("cuda"))
    )
    facts = replace(facts, **asked)  # type: ignore[arg-type]
    serving = [each for each in ATTENTION_BACKENDS if not each.traits >= FOR_CPUS and each.unavailable(facts) is None]
    assert serving
    starts, view = starts_of(100, 1, 299) if documents else None, view_of()
    if starts is not None:
        attach_offsets(starts, DocumentOffsets.of(starts.cpu()).to("cuda"))
    for backend in serving:
        target, deterministic = load_target(backend.target), bool(asked.get("deterministic"))
        torch.use_deterministic_algorithms(deterministic)
        try:
            found = []
            for kernel in (target, target, plain_attention):
                parts, grad = inputs(torch.bfloat16)
                out = kernel(*parts, 0.0, starts, view)
                found.append([out, *torch.autograd.grad(out, parts, grad)])
        finally:
            torch.use_deterministic_algorithms(False)
        for got, again, want in zip(*found, strict=True):
            assert (got.float() - want.float()).abs().max() < 0.02 * want.float().abs().max(), backend.name
            if deterministic:
                assert torch.equal(got, again), backend.name


def test_flash_attns_dropout_keeps_the_mean() -> None:
    pytest.importorskip("flash_attn")
    (q, k, _), _ = inputs(torch.bfloat16)
    out = load_target("megatron.kernels.flash_attention:flash_2_attention")(q, k, torch.ones_like(k), 0.25)
    assert out.float().mean().item() == pytest.approx(1.0, abs=0.02)
    assert out.float().std() > 0.01


@pytest.mark.parametrize(("theirs", "ours"), [("te_layernorm", "layernorm"), ("te_rmsnorm", "rmsnorm")])
def test_transformer_engines_norms_are_ours(theirs: str, ours: str) -> None:
    pytest.importorskip("transformer_engine")
    with torch.device("cuda"):
        first, second = (NORMS.load(name)(256, 1e-5, True) for name in (theirs, ours))
        x = torch.randn(7, 3, 256)
    torch.testing.assert_close(first(x), second(x), rtol=1e-4, atol=1e-5)
