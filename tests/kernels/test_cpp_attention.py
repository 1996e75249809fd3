"""The compiled attention of the CPU against the formula in float64: types, lengths, groups, masks, biases, builds."""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.kernels import cpp_attention as compiled
from megatron.kernels import cpp_build
from megatron.kernels.attention_patterns import AttentionMask, BlockPattern, Window
from megatron.kernels.blocked_attention import blocked_attention
from megatron.kernels.cpp_build import FLAGS, FOLDER, library

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.02}
"""Of the largest value: bfloat16 keeps 8 bits."""
# batch, query heads, key/value heads, positions, head dim
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 2, 2, 2, 48),
    (1, 4, 2, 47, 32),
    (3, 2, 1, 48, 16),
    (2, 6, 2, 97, 64),
    (1, 2, 2, 192, 128),
    (1, 4, 1, 301, 80),
    (1, 2, 1, 389, 32),
]
MASKS = [
    "causal",
    "documents",
    "long documents",
    "window",
    "window of 1",
    "window of 110",
    "bias",
    "bound",
    "all",
    "all, bound",
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v as parts of one tensor, as a model projects them, and an output gradient with other strides."""
    batch, heads, groups, length, size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    joint = torch.randn(length, batch, heads + 2 * groups, size, generator=generator).to(dtype)
    parts = joint.permute(1, 2, 0, 3).split([heads, groups, groups], 1)
    grad = torch.randn(batch, length, heads, size, generator=generator).to(dtype).transpose(1, 2)
    return (*(part.detach().requires_grad_() for part in parts), grad)


def masks(kind: str, shape: tuple[int, ...]) -> tuple[Tensor | None, AttentionMask | None]:
    """Document starts and the view."""
    batch, heads, _, length, _ = shape
    starts = None
    if kind in ("documents", "long documents", "all", "all, bound"):
        share = 0.01 if kind == "long documents" else 0.05
        borders = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < share
        starts = torch.where(borders, torch.arange(length), 0).cummax(1).values
    widths = {"window": 20, "window of 1": 1, "window of 110": 110, "all": 70, "all, bound": 70}
    window = Window(widths[kind]) if kind in widths else None
    bias = None
    if kind in ("bias", "all", "all, bound"):
        bias = torch.randn(heads, length + 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    bound = 1.5 if "bound" in kind else None
    nothing = window is None and bias is None and bound is None
    return starts, None if nothing else AttentionMask(window, bias, softcap=bound)


def formula(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, view: AttentionMask | None) -> Tensor:
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    rows, keys = torch.arange(length)[:, None], torch.arange(length)
    seen = (keys <= rows).expand(len(q), 1, length, length)
    if starts is not None:
        seen = seen & (keys >= starts[:, None, :, None])
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) / math.sqrt(q.shape[-1])
    if view is not None and isinstance(view.pattern, Window):
        seen = seen & (keys > rows - view.pattern.width)
    if view is not None and view.softcap is not None:
        scores = view.softcap * torch.tanh(scores / view.softcap)
    if view is not None and view.bias is not None:
        scores = scores + view.bias[:, (rows - keys).clamp(min=0)]
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v.repeat_interleave(group, 1)


def results(
    function: Any, shape: tuple[int, ...], kind: str, dtype: torch.dtype, *, exact: bool = False
) -> list[Tensor]:
    """The output and the gradients of q, k, v and the bias, in float64."""
    *parts, grad = inputs(shape, dtype)
    starts, view = masks(kind, shape)
    if exact:
        parts, grad = [part.detach().double().requires_grad_() for part in parts], grad.double()
    if view is not None and view.bias is not None:
        bias = view.bias.detach().double().requires_grad_() if exact else view.bias
        view, parts = AttentionMask(view.pattern, bias, softcap=view.softcap), [*parts, bias]
    out = function(*parts[:3], starts, view)
    return [out.detach().double(), *(found.double() for found in torch.autograd.grad(out, parts, grad))]


def agree(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    expected = results(formula, shape, kind, dtype, exact=True)
    for found, right in zip(results(compiled.cpp_attention, shape, kind, dtype), expected, strict=True):
        assert (found - right).abs().max() <= TOLERANCE[dtype] * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_formula_s(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    agree(shape, kind, dtype)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """The kernel as other processors run it: without products of bfloat16, and without AVX-512."""
    found = {}
    for name, switch in (("no bfloat16", "-mno-avx512bf16"), ("AVX2", "-march=x86-64-v3")):
        file = tmp_path_factory.mktemp("older") / "attention.so"
        sources = map(str, Path(FOLDER).glob("attention*.cpp"))
        subprocess.run(["g++", *FLAGS, switch, *sources, "-o", str(file)], check=True)
        found[name] = ctypes.CDLL(str(file))
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], SHAPES[6], SHAPES[7]], ids=str)
@pytest.mark.parametrize("build", ["no bfloat16", "AVX2"])
def test_other_processors_give_the_same(
    build: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    older: dict[str, ctypes.CDLL],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpp_build, "library", lambda: older[build])
    for kind in ("causal", "long documents", "all", "all, bound"):
        agree(shape, kind, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 2, 150, 32), (1, 2, 1, 389, 32)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(results(compiled.cpp_attention, shape, "all", dtype))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_nothing_of_the_size_of_the_scores_is_retained() -> None:
    q, k, v, _ = inputs((1, 2, 2, 300, 16), torch.float32)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        compiled.cpp_attention(q, k, v)
    assert max(saved) == q.numel()


def test_it_takes_no_nan_or_inf_from_the_future() -> None:
    q, k, v, _ = (x.detach() for x in inputs((1, 2, 2, 100, 16), torch.float32))
    before = compiled.cpp_attention(q, k, v)
    k[:, :, 60:] = float("inf")
    v[:, :, 60:] = 1e30
    assert torch.equal(compiled.cpp_attention(q, k, v)[:, :, :60], before[:, :, :60])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("position", [0, 70, 133, 249])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_rows_that_see_a_nan_are_nan(part: str, position: int, dtype: torch.dtype) -> None:
    width, rows = 100, torch.arange(250)
    parts = [x.detach() for x in inputs((2, 4, 2, 250, 32), dtype)[:3]]
    view = AttentionMask(Window(width))
    before = compiled.cpp_attention(*parts, None, view)
    parts["qkv".index(part)][:, :, position, 3] = float("nan")
    out = compiled.cpp_attention(*parts, None, view)
    sees = rows == position if part == "q" else (rows >= position) & (rows < position + width)
    assert out[:, :, sees, 3 if part == "v" else ...].isnan().all()
    # A weight of zero times a value that is not a number is none either, so rows near it may be none.
    others = (rows < position - 24) | (rows > position + width + 24) if part == "v" else ~sees
    assert torch.equal(out[:, :, others], before[:, :, others])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("position", [0, 133, 249])
def test_a_nan_of_the_output_s_gradient_reaches_what_its_row_saw(position: int, dtype: torch.dtype) -> None:
    q, k, v, grad = inputs((2, 4, 2, 250, 32), dtype)
    rows = torch.arange(250)
    grad[:, :, position, 5] = float("nan")
    of_q, of_k, of_v = torch.autograd.grad(compiled.cpp_attention(q, k, v), (q, k, v), grad)
    assert of_q[:, :, position].isnan().all()
    assert of_q[:, :, rows != position].isfinite().all()
    assert of_k[:, :, rows <= position].isnan().all()
    assert of_v[:, :, rows <= position, 5].isnan().all()
    assert of_k[:, :, rows > position].isfinite().all()


def test_large_scores_stay_finite() -> None:
    q, k, v, grad = inputs((1, 2, 2, 100, 16), torch.float32)
    parts = [(q * 200).detach().requires_grad_(), k, v]
    out = compiled.cpp_attention(*parts)
    assert out.isfinite().all()
    assert all(found.isfinite().all() for found in torch.autograd.grad(out, parts, grad))


def test_what_it_cannot_do_is_said() -> None:
    q = torch.zeros(2, 4, 8, 16)
    assert compiled.cpp_attention_unavailable(q, q) is None

    class Layout:
        block, per_head = 4, False

        def seen(self, row: int, head: int = 0) -> list[int]:
            return [row]

    others: dict[str, tuple[Any, ...]] = {
        "float64": (q.double(), q),
        "heads of a multiple of 16": (q[..., :8], q),
        "no other pattern": (q, q, AttentionMask(BlockPattern(Layout(), range(4)))),
        "meta": (q.to("meta"), q),
    }
    for part, arguments in others.items():
        assert part in (compiled.cpp_attention_unavailable(*arguments) or "")


def test_without_a_compiler_the_blocks_of_torch_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_build, "library", lambda: "There is no C++ compiler")
    q = torch.zeros(2, 4, 8, 16)
    assert compiled.cpp_attention_unavailable(q, q) == "There is no C++ compiler"
    assert isinstance(library(), ctypes.CDLL)
    for kind in ("all", "all, bound"):
        expected = results(blocked_attention, SHAPES[4], kind, torch.float32)
        for found, right in zip(results(formula, SHAPES[4], kind, torch.float32, exact=True), expected, strict=True):
            assert (found - right).abs().max() <= 2e-5 * max(1.0, float(right.abs().max()))
