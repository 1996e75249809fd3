"""What every test shares: nothing heavy, so that a test which needs no torch starts at once."""

from __future__ import annotations

import os

import pytest

# Tests share few cores; numpy and torch read this when they are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU Triton's kernels run in its interpreter; Triton reads this when it is first imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of a dataset of real text, a token a byte; its cached indices are shared by the tests of a session."""
    from tests.end_to_end.runs import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data"))


SLOW_FIRST = ("end_to_end", "serving", "parity", "engine", "training", "inference", "checkpoint")
"""Folders whose files take longest; started first, they leave no process waiting at the end for another's last file."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts slow files before quick ones; the order within a file stays."""

    def turn(item: pytest.Item) -> int:
        return next((number for number, name in enumerate(SLOW_FIRST) if name in item.path.parts), len(SLOW_FIRST))

    items.sort(key=turn)
