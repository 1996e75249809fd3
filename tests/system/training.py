"""The small run that every launcher starts, and what became of it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from megatron.checkpoint.format import layout
from megatron.metrics.sinks.jsonl import read_metrics
from tests.end_to_end.runs import BASE, series

ROOT = Path(__file__).resolve().parents[2]
TRAIN = (sys.executable, str(ROOT / "train.py"), "run.json")
DEEPY = (sys.executable, str(ROOT / "deepy.py"), "train.py", "run.json")
SCHEDULE = {"train_iters": 20, "lr_decay_iters": 20, "zero_optimization": {"stage": 1}}
ENDLESS = 100_000


def write(folder: Path, dataset: str, **settings: Any) -> None:
    """run.json in the folder: a run that saves every five steps and goes on from what it has saved."""
    retained = {"save": "save", "load": "save", "load_fallback": "fresh", "checkpoint_factor": 5, "data_path": dataset}
    (folder / "run.json").write_text(json.dumps({**BASE, **SCHEDULE, **retained, **settings}))


def losses(folder: Path) -> list[float]:
    """The losses of all steps of the run."""
    return series(read_metrics(folder / "save" / "logs" / "metrics.jsonl"), "train/lm_loss")


def wait_until_saved(folder: Path, seconds: float = 120) -> None:
    """Waits for the first checkpoint."""
    path = folder / "save" / "global_step5" / layout.MANIFEST
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.1)


def last_saved(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return layout.iterations(folder / "save")[-1]


def stopped_after(said: str) -> int:
    """The step that a run says it stopped after."""
    return int(said.split("stopped after iteration ")[1].split(":", maxsplit=1)[0])
