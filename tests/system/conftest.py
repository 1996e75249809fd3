"""Data of the runs on real schedulers and hosts, and the losses of an undisturbed one."""

from __future__ import annotations

import pytest

from tests.end_to_end.runs import run, series
from tests.system.training import SCHEDULE


@pytest.fixture(scope="session")
def undisturbed(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of two ranks that were started here and ran through."""
    return series(run(2, tmp_path_factory.mktemp("whole"), data_path=dataset, **SCHEDULE), "train/lm_loss")
