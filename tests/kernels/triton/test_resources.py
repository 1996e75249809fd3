"""Triton's kernels are compiled for real GPUs, without one: they compile, spill nothing and stay within limits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
REGISTERS = 170  # of a thread: three programs of four warps fit on a multiprocessor
SHARED = 48 * 1024  # bytes that every architecture grants without being asked
# Element 2i and 2i + 1 are read apart, causal masks and blocks of a matrix have edges that depend on the row.
WITHOUT_WIDE_LOADS = ("rotate(interleaved", "rotate(given, interleaved", "softmax_forward", "symmetric_product()")


def resources(*targets: str) -> list[dict[str, Any]]:
    """What each kernel needs on each target, from a process in which Triton compiles instead of interpreting."""
    command = [sys.executable, "-m", "benchmarks.kernel_resources"]
    command += [word for target in targets for word in ("--target", target)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]], targets: tuple[str, ...]) -> None:
    assert {each["target"] for each in found} == set(targets)
    files = [path.stem for path in (ROOT / "megatron/kernels/triton").glob("*.py") if "@triton.jit" in path.read_text()]
    assert len(found) > 2 * len(files) * len(targets)
    for each in found:
        assert each["spilled"] == 0, each
        assert each["registers"] <= REGISTERS, each
        assert each["shared"] <= SHARED, each
        if each["target"] == "sm_90" and not each["kernel"].startswith(WITHOUT_WIDE_LOADS):
            assert each["wide_loads"] >= 1, each


def test_every_kernel_compiles_for_hopper() -> None:
    found = resources("sm_90")
    check(found, ("sm_90",))
    table = (ROOT / "docs/performance.md").read_text()
    listed = re.findall(r"^\| `(\w+\([\w, ]*\))` \|", table, re.MULTILINE)
    assert sorted(set(listed)) == sorted({each["kernel"] for each in found}), "write the table again"


@pytest.mark.long
def test_every_kernel_compiles_for_every_architecture() -> None:
    check(resources(*TARGETS), TARGETS)
