"""The flash-attn packages, flexible and masked attention of documents, against plain attention in float64.

The packages need a GPU. `flash_package.py` has their functions with their arithmetic written out, so that what is
proved is our call: offsets, windows, slopes, layouts and the choice of function. tests/gpu has the packages themselves.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.block_sparsity import layout_of
from megatron.data.dataset.batch import MicroBatch
from megatron.kernels import flash_attention as flash
from megatron.kernels.attention import cpu_attention, cudnn_attention, plain_attention, sdpa_attention
from megatron.kernels.attention_patterns import AttentionMask, BlockPattern, Window
from megatron.kernels.documents import DocumentOffsets, attach_offsets, offsets_of
from megatron.kernels.flex_attention import flex_attention
from megatron.model.positions.alibi import slopes
from tests.kernels.flash_package import FlashPackage, attend

HEADS, KV_HEADS, LENGTH, SIZE = 4, 2, 24, 16
PACKAGES = {2: flash.flash_2_attention, 3: flash.flash_3_attention, 4: flash.flash_4_attention}
# Lengths of the documents of each row.
LAYOUTS: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((24,),),
    ((24,), (24,)),
    ((12, 12),),
    ((12, 12), (12, 12)),
    ((1,) * 24,),
    ((1,) * 24, (24,)),
    ((24,), (1,) * 24),
    ((1, 23),),
    ((23, 1),),
    ((1, 22, 1), (11, 1, 12)),
    ((5, 5, 5, 5, 4),),
    ((6, 18), (7, 17), (8, 16)),
    ((2,) * 12, (3,) * 8),
    ((4, 20), (24,), (1, 1, 1, 21)),
    ((13, 11), (11, 13)),
    ((1, 2, 3, 4, 5, 6, 3),),
    ((3, 6, 5, 4, 3, 2, 1), (24,)),
    ((20, 1, 1, 1, 1),),
    ((5, 19), (19, 5), (10, 4, 10), (1, 23)),
    ((8, 8, 8), (24,), (16, 8)),
)


def starts_of(layout: tuple[tuple[int, ...], ...]) -> Tensor:
    rows = [torch.tensor(row) for row in layout]
    return torch.stack([torch.repeat_interleave(row.cumsum(0) - row, row) for row in rows])


def inputs(batch: int, queries: int = LENGTH, keys: int = LENGTH) -> tuple[list[Tensor], Tensor]:
    """q, k, v as strided views of [s, b, n, d], as the model has them, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(queries, batch, HEADS, SIZE), (keys, batch, KV_HEADS, SIZE), (keys, batch, KV_HEADS, SIZE)]
    shapes.append(shapes[0])
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).permute(1, 2, 0, 3) for shape in shapes]
    return [part.requires_grad_() for part in made[:3]], made[3]


def alibi(length: int = LENGTH) -> AttentionMask:
    steep = torch.tensor(slopes(HEADS))
    return AttentionMask(None, -steep[:, None] * torch.arange(length), steep)


def views() -> dict[str, AttentionMask | None]:
    linear = alibi()
    return {
        "causal": None,
        "window of 5": AttentionMask(Window(5)),
        "window of 1": AttentionMask(Window(1)),
        "alibi": linear,
        "alibi in a window": AttentionMask(Window(7), linear.bias, linear.slopes),
    }


@pytest.fixture
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FlashPackage:
    """The stand-in of a version, in place of the modules of the package."""
    made = FlashPackage(request.param)
    for name, module in made.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def results(
    kernel: flash.AttentionKernel, starts: Tensor | None, view: AttentionMask | None, batch: int
) -> list[Tensor]:
    parts, grad = inputs(batch)
    out = kernel(*parts, 0.0, starts, view)
    return [out, *torch.autograd.grad(out, parts, grad)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal but for the order of sums, in float64; plain attention computes its softmax in fp32."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("package", [2], indirect=True)
def test_documents_by_offsets_by_flex_and_by_mask_are_the_same(
    package: FlashPackage, layout: tuple[tuple[int, ...], ...]
) -> None:
    """In every view; flex, the package's arithmetic and torch's mask to the rounding of float64."""
    starts = starts_of(layout)
    for view in views().values():
        expected = results(plain_attention, starts, view, len(layout))
        joined = results(flash.flash_2_attention, starts, view, len(layout))
        masked = results(sdpa_attention, starts, view, len(layout))
        assert_equal(joined, expected)
        assert_equal(masked, expected)
        assert_equal(results(cpu_attention, starts, view, len(layout)), expected)
        parts = [part.detach() for part in inputs(len(layout))[0]]  # flex has no backward pass on a CPU
        out = flex_attention(*parts, starts, view or AttentionMask())
        torch.testing.assert_close(out, joined[0], rtol=1e-12, atol=1e-12)
        if view is None or view.bias is None:  # a bias is added by plain attention, which computes in fp32
            torch.testing.assert_close(out, masked[0], rtol=1e-12, atol=1e-12)
    assert {name for name, _ in package.calls} == {"flash_attn_varlen_func"}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("package", PACKAGES, indirect=True)
def test_every_version_is_called_as_it_asks_to_be(
    package: FlashPackage, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "gpu_attention", plain_attention)
    layout = ((5, 19), (24,)) if documents else ((24,), (24,))
    starts = starts_of(layout) if documents else None
    kernel = PACKAGES[package.version]
    for name, view in views().items():
        package.calls.clear()
        expected = results(plain_attention, starts, view, 2)
        if package.version == 2 or "alibi" not in name:
            assert_equal(results(kernel, starts, view, 2), expected)
            ((function, options),) = package.calls
            assert function == ("flash_attn_varlen_func" if documents else "flash_attn_func")
            assert options["deterministic"] is False
        else:  # a bias that the version lacks
            parts = [part.detach() for part in inputs(2)[0]]
            assert_equal([kernel(*parts, 0.0, starts, view)], expected[:1])
            assert package.calls == []


@pytest.mark.parametrize("package", PACKAGES, indirect=True)
def test_what_a_package_lacks_goes_to_torch(package: FlashPackage, monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[object] = []
    monkeypatch.setattr(flash, "gpu_attention", lambda *args: others.append(args[5]) or plain_attention(*args))
    layout = layout_of("bigbird", {"block": 8}, 1)
    assert layout is not None
    learned = AttentionMask(None, torch.randn(HEADS, LENGTH, dtype=torch.float64))
    for view in (AttentionMask(BlockPattern(layout, range(HEADS))), learned):
        expected = results(plain_attention, None, view, 1)
        parts = [part.detach() for part in inputs(1)[0]]
        assert_equal([PACKAGES[package.version](*parts, 0.0, None, view)], expected[:1])
    if package.version > 2:
        PACKAGES[package.version](*inputs(1)[0], 0.5, None, None)
    assert package.calls == []
    assert len(others) == (2 if package.version == 2 else 3)


@pytest.mark.parametrize("package", PACKAGES, indirect=True)
def test_cached_keys_and_deterministic_backward_passes(package: FlashPackage) -> None:
    for queries in (1, 5):
        parts, _ = inputs(2, queries, LENGTH)
        assert_equal([PACKAGES[package.version](*parts, 0.0)], [plain_attention(*parts)])
    torch.use_deterministic_algorithms(True)
    try:
        PACKAGES[package.version](*inputs(1)[0], 0.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [options["deterministic"] for _, options in package.calls] == [False, False, True]


@pytest.mark.parametrize("package", [2], indirect=True)
def test_dropout_reaches_the_package(package: FlashPackage) -> None:
    with pytest.raises(ValueError, match="no dropout"):
        flash.flash_2_attention(*inputs(1)[0], 0.1)
    assert package.calls[0][1]["dropout_p"] == 0.1


def test_torchs_varlen_kernel_gets_offsets_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, **options: object
    ) -> Tensor:
        calls.append(options)
        assert cu_seq_q is cu_seq_k and max_q == max_k and set(options) == {"window_size", "enable_gqa"}
        lengths = cu_seq_q.diff().tolist()
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        left, right = options["window_size"]  # type: ignore[misc]
        return torch.cat([attend(*part, causal=False, window=(left, right)) for part in parts])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    for layout in LAYOUTS[:12]:
        for view in (None, AttentionMask(Window(5))):
            starts = starts_of(layout)
            expected = results(plain_attention, starts, view, len(layout))
            assert_equal(results(flash.varlen_attention, starts, view, len(layout)), expected)
    assert_equal(
        results(flash.varlen_attention, None, AttentionMask(Window(5)), 2),
        results(plain_attention, None, AttentionMask(Window(5)), 2),
    )
    assert {str(options["window_size"]) for options in calls} == {"(-1, 0)", "(4, 0)"}
    assert all(options["enable_gqa"] for options in calls)


def test_the_stand_in_caps_scores_and_aligns_to_the_last_key() -> None:
    """By hand: two queries of four keys see three and four; a cap of 1 holds scores of 100 at tanh(100) = 1."""
    q, k = torch.full((2, 1, 4), 10.0, dtype=torch.float64), torch.full((4, 1, 4), 5.0, dtype=torch.float64)
    v = torch.eye(4, dtype=torch.float64)[:, None]
    third, quarter = 1 / 3, 0.25
    want = torch.tensor([[third, third, third, 0.0], [quarter] * 4], dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v, causal=True)[:, 0], want)
    k = k * torch.tensor([1.0, 1.0, 1.0, -1.0]).view(4, 1, 1)
    capped = attend(q[:1], k, v, causal=True, softcap=1.0)[0, 0]
    assert (capped[0] / capped[3]).item() == pytest.approx(torch.e**2)


class Shapes(TorchDispatchMode):
    """Collects the shapes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(one, Tensor):
                self.seen.add(tuple(one.shape))
        return found


@pytest.mark.parametrize("package", [2], indirect=True)
def test_no_mask_exists_and_offsets_are_made_once_a_batch(
    package: FlashPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector would see a mask: it sees the one of masked attention."""
    package.core = lambda q, k, v, **options: q * 1.0
    made = []
    monkeypatch.setattr(DocumentOffsets, "of", lambda starts: made.append(1) or of(starts))
    starts, parts = starts_of(((5, 19), (24,))), inputs(2)[0]
    with Shapes() as shapes:
        for _ in range(3):  # layers
            flash.flash_2_attention(*parts, 0.0, starts, views()["alibi in a window"])
    squares = {shape for shape in shapes.seen if shape[-2:] == (LENGTH, LENGTH)}
    assert squares == set()
    assert made == [1]
    with Shapes() as shapes:
        sdpa_attention(*parts, 0.0, starts)
    assert any(shape[-2:] == (LENGTH, LENGTH) for shape in shapes.seen)


of = DocumentOffsets.of


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_offsets_are_the_ends_of_documents(layout: tuple[tuple[int, ...], ...]) -> None:
    found = offsets_of(starts_of(layout))
    lengths = [length for row in layout for length in row]
    assert found.offsets.tolist() == [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    assert (found.offsets.dtype, found.longest) == (torch.int32, max(lengths))
    rows = DocumentOffsets.of_rows(3, 7, torch.device("cpu"))
    assert (rows.offsets.tolist(), rows.longest) == ([0, 7, 14, 21], 7)


def test_a_batch_that_goes_to_another_device_takes_its_offsets_along() -> None:
    starts = starts_of(((5, 19), (12, 12)))
    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    batch = MicroBatch(tokens, tokens, torch.ones(2, LENGTH), starts)
    there = batch.to("meta").document_starts
    assert there is not None
    assert (offsets_of(there).offsets.device.type, offsets_of(there).longest) == ("meta", 19)
    assert offsets_of(there).offsets.shape == (5,)
    moved = batch.to("meta")
    assert moved.document_starts is not None
    assert moved.tensors()[-1] is offsets_of(moved.document_starts).offsets
    assert len(batch.tensors()) == 4
    again = batch.to("cpu").document_starts
    assert again is starts
    attach_offsets(starts, DocumentOffsets.of_rows(1, 2, torch.device("cpu")))
    assert offsets_of(starts).longest == 2


def test_the_mask_of_blocks_is_made_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    create = flex.create_block_mask
    monkeypatch.setattr(flex, "create_block_mask", lambda *args, **more: made.append(1) or create(*args, **more))
    parts = [part.detach() for part in inputs(2)[0]]
    linear = alibi()
    for starts in (starts_of(((5, 19), (24,))), starts_of(((24,), (3, 21)))):  # batches
        for view in (AttentionMask(Window(7), linear.bias), AttentionMask(Window(7)), AttentionMask(Window(3))):
            out = flex_attention(*parts, starts, view)
            torch.testing.assert_close(out, plain_attention(*parts, 0.0, starts, view), rtol=1e-4, atol=1e-5)
    assert len(made) == 4


@pytest.mark.parametrize("package", [2], indirect=True)
def test_torch_compile_makes_one_graph_of_a_call(package: FlashPackage) -> None:
    package.core = lambda q, k, v, **options: q * 1.0
    q = torch.randn(2, 4, 8, 16)
    for kernel, view in ((flash.flash_2_attention, AttentionMask(Window(4))), (cudnn_attention, None)):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda x, kernel=kernel, view=view: kernel(x, x, x, 0.0, None, view), backend="eager", fullgraph=True
        )
        assert compiled(q).shape == q.shape
