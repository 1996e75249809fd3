"""Applies seeded errors one by one in a copy of the working tree, and asks whether the tests notice.

    python -m tests.mutants.run [--only TEXT]

A mutant is caught if one of its test files fails; these run in the default run (`make test`). Exit code 0: all caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megatron", "tests", "tools", "configs", "docs", "examples", "benchmarks", "requirements")
TEST_FAILED = 1  # pytest's exit code; others mean that no test could run
TEST_SECONDS = 900


def copy_tree(target: Path) -> None:
    """Copies what tests read of the working tree."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, target / path.name)


def changed(mutant: Mutant, text: str) -> str:
    """The file with the error in it. ValueError where the text to replace is not there exactly once."""
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.path} has `{mutant.old}` {text.count(mutant.old)} times; bring the mutant up to date"
        )
    return text.replace(mutant.old, mutant.new)


def is_caught(mutant: Mutant, tree: Path) -> bool:
    """True if a test fails with the error in place. RuntimeError where the tests cannot run at all."""
    path = tree / "megatron" / mutant.path
    original = path.read_text(encoding="utf-8")
    path.write_text(changed(mutant, original), encoding="utf-8")
    try:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        for test in mutant.tests:
            done = subprocess.run(
                [*command, f"tests/{test}"],
                cwd=tree,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TEST_SECONDS,
                check=False,
            )
            if done.returncode == TEST_FAILED:
                return True
            if done.returncode:
                raise RuntimeError(f"tests/{test} ended with {done.returncode}\n{done.stdout[-2000:]}")
        return False
    finally:
        path.write_text(original, encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Runs one command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Ask whether the tests notice seeded errors.")
    parser.add_argument("--only", default="", help="mutants whose name or path holds this text")
    only = parser.parse_args(arguments).only
    missed = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        chosen = [mutant for mutant in MUTANTS if only in mutant.name or only in mutant.path]
        for mutant in chosen:
            started = time.monotonic()
            caught = is_caught(mutant, tree)
            missed += not caught
            seconds = time.monotonic() - started
            print(f"{'caught' if caught else 'MISSED'}  {seconds:5.0f} s  {mutant.path}: {mutant.name}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
