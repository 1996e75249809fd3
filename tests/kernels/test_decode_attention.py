"""Attention of one query against float64, for every shape of heads, type and raggedness, and its compilation."""

import ctypes
from pathlib import Path

import pytest
import torch

from megatron.kernels import cpp_build
from megatron.kernels.decode_attention import (
    choose_decode_attention,
    native_attention_unavailable,
    native_decode_attention,
    plain_decode_attention,
)

CPU = torch.device("cpu")
# Of the largest value: fp32 sums of some hundred terms, and the rounding of the result to bfloat16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


@pytest.fixture(scope="module", autouse=True)
def compiled():
    assert isinstance(cpp_build.library(), ctypes.CDLL), cpp_build.library()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "shared", "size"), [(4, 4, 64), (6, 2, 16), (2, 1, 80), (1, 1, 256), (3, 3, 48)])
@pytest.mark.parametrize("turned", [0, 16])
@pytest.mark.parametrize("count", [1, 15, 16, 100, 333])
def test_it_is_the_formula(dtype, heads, shared, size, turned, count):
    torch.manual_seed(count)
    # Layers, keys and values, rows: as in a cache. What is behind a row's end may be anything, NaN too.
    memory = torch.full((5, 2, 3, shared, count + 7, size), float("nan")).to(dtype)
    ends = torch.tensor([count, max(1, count // 2), 1])
    for row, end in enumerate(ends.tolist()):
        memory[2, :, row, :, : end - 1] = torch.randn(2, shared, end - 1, size).to(dtype)
    joint = 3 * torch.randn(3, heads // shared + 2, shared, size).to(dtype).transpose(1, 2)  # strided, as a layer's
    q, k, v = joint[:, :, :-2].reshape(3, heads, size), joint[:, :, -2], joint[:, :, -1]
    angles = torch.outer(torch.arange(count + 3.0), 0.7 ** torch.arange(turned / 2))
    table = (angles.cos(), angles.sin()) if turned else None
    expected = memory.clone()
    target = plain_decode_attention(q, k, v, expected[2, 0], expected[2, 1], ends, table)
    found = native_decode_attention(q, k, v, memory[2, 0], memory[2, 1], ends, table)
    assert found.dtype == dtype
    assert (found - target).abs().max() <= TOLERANCE[dtype] * target.abs().max()
    assert torch.allclose(memory, expected, rtol=TOLERANCE[dtype], atol=1e-6, equal_nan=True)


def test_large_scores_do_not_overflow_and_errors_are_seen():
    q, keys = torch.full((1, 1, 16), 1e4), torch.ones(1, 1, 3, 16)
    keys[0, 0, 1] = 2.0
    values, ends = torch.arange(48.0).view(1, 1, 3, 16), torch.tensor([3])
    k, v = keys[:, :, 2].clone(), values[:, :, 2].clone()
    assert torch.equal(native_decode_attention(q, k, v, keys, values, ends)[0, 0], values[0, 0, 1])
    keys[0, 0, 0, 0] = float("nan")
    assert native_decode_attention(q, k, v, keys, values, ends).isnan().all()


def test_why_it_cannot_be_used_is_reported():
    assert native_attention_unavailable(CPU, torch.float32, 64) is None
    assert "float16" in native_attention_unavailable(CPU, torch.float16, 64)
    assert "20" in native_attention_unavailable(CPU, torch.float32, 20)
    assert "meta" in native_attention_unavailable(torch.device("meta"), torch.float32, 64)
    assert choose_decode_attention(CPU, torch.float32, 20) is None


def test_it_is_compiled_once_and_a_missing_compiler_is_reported(tmp_path, monkeypatch):
    """Shown with the shortest of its sources; `compiled` above is the whole."""
    shortest = min(cpp_build.SOURCES, key=lambda source: source.stat().st_size)
    monkeypatch.setattr(cpp_build, "SOURCES", (shortest,))
    first = cpp_build.compiled(tmp_path, "g++")
    made = first.stat().st_mtime_ns
    assert cpp_build.compiled(tmp_path, "g++") == first and first.stat().st_mtime_ns == made
    assert "TORCH_EXTENSIONS_DIR names another folder" in str(cpp_build.compiled(Path("/proc/no"), "g++"))
    assert "no C++ compiler" in cpp_build.compiled(tmp_path, "no-such-compiler")
    (tmp_path / "broken").write_text("#!/bin/sh\necho no >&2; test $1 = --version\n")
    (tmp_path / "broken").chmod(0o755)
    reported = cpp_build.compiled(tmp_path, str(tmp_path / "broken"))
    assert "cannot compile" in reported and reported.endswith(": no.")


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(cpp_build.SWITCH, "0")
    assert "switches" in cpp_build.library.__wrapped__()
