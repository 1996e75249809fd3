"""Steps of the training loop on a fake GPU: the host neither reads a value nor waits for a copy between reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RUNS = ("fp32, ZeRO 0", "bfloat16, ZeRO 1", "experts", "masked tokens and order", "spans")
READ, COPY = "DataDependentOutputException", "BlockingCopy"
PLANTED = {
    "planted: the loss is read": READ,
    "planted: the flag is tested": READ,
    "planted: a copy that waits": COPY,
    "planted: a number is copied to the GPU": COPY,
    "planted: a tensor is made of a number": COPY,
    "planted: an optimizer without a flag": READ,
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """The outcomes of all cases, from one process in which the fake GPU is there before torch."""
    command = [sys.executable, "-m", "tests.fake_gpu.steps"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("run", RUNS)
def test_the_host_never_waits_between_reports(run: str, outcomes: dict[str, Any]) -> None:
    assert outcomes[run] is None


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_wait_is_an_error(bug: str, outcomes: dict[str, Any]) -> None:
    assert PLANTED[bug] in (outcomes[bug] or "")


def test_every_case_is_asserted(outcomes: dict[str, Any]) -> None:
    assert set(outcomes) == {*RUNS, *PLANTED}
