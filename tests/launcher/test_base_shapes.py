"""Base shapes of muP on the command line: written without a worker, shown in the plan, rejected on a mismatch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launcher.conftest import CONFIG, ROOT

Run = Callable[..., "subprocess.CompletedProcess[str]"]
WRITE = ("--save-base-shapes", "true", "--base-shapes-file", "made/base.json")
READ = ("--use-mup", "true", "--base-shapes-file", "made/base.json")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "conf.yml").write_text(CONFIG)

    def call(*command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *options, str(ROOT / command[0]), *command[1:]],
            cwd=tmp_path,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return call


def test_the_launcher_writes_them_itself_and_imports_no_torch(run: Run, tmp_path: Path) -> None:
    done = run("deepy.py", "train.py", "conf", *WRITE, options=("-X", "importtime"))
    assert (done.returncode, done.stdout) == (0, "made/base.json\n"), done.stderr
    assert " torch\n" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conf.yml", "made"]
    written = json.loads((tmp_path / "made/base.json").read_text(encoding="utf-8"))
    assert written["widths"]["hidden_size"] == 64
    assert written["tensors"]["0.word_embeddings.weight"] == [None, 64]
    plan = run("deepy.py", "train.py", "conf", *READ, "--hidden-size", "256", "--dry-run").stdout
    assert "muP          4 x as wide as the base of 64 in made/base.json" in plan
    other = run("deepy.py", "train.py", "conf", *READ, "--num-layers", "3", "--dry-run")
    assert other.returncode == 2
    assert "it is the base of another architecture: it lacks 4.input_layernorm.weight" in other.stderr


def test_a_worker_of_another_launcher_writes_them_too(run: Run, tmp_path: Path) -> None:
    """As torchrun starts it."""
    done = run("train.py", "conf.yml", *WRITE)
    assert (done.returncode, done.stdout) == (0, "made/base.json\n"), done.stderr
    assert (tmp_path / "made/base.json").is_file()


def test_a_folder_that_cannot_be_written_is_reported(run: Run, tmp_path: Path) -> None:
    (tmp_path / "made").write_text("a file")
    done = run("deepy.py", "train.py", "conf", *WRITE)
    assert done.returncode == 2
    assert "base_shapes_file = 'made/base.json': the file cannot be written (File exists)" in done.stderr
