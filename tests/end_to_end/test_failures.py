"""Ranks that hang or fail end the run in time, and the message names the rank and its stack; a killed run goes on."""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.data.dataset.loader import BatchLoader
from megatron.metrics.sinks.jsonl import read_metrics
from tests.end_to_end.launches import LIMIT, Run
from tests.end_to_end.runs import BASE, run_rank, series
from tests.end_to_end.runs import run as train_alone
from tests.multi_rank import RankFailedError, run_distributed


@pytest.fixture(scope="module")
def frozen(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Run, int]]]:
    """A run that trains and one whose model writes; rank 1 stops in the middle of it, as a machine that hangs does.

    Only the other rank can tell. Both run at once, since most of the time they wait.
    """
    folder = tmp_path_factory.mktemp("frozen")
    saving = {"train_iters": 2, "save": str(folder / "writes" / "save"), "checkpoint_factor": 2}
    train_alone(1, folder / "trained", data_path=dataset, **saving)
    settings = {"text_gen_type": "unconditional", "num_samples": 100000, "sample_output_file": "texts.jsonl"}
    settings |= {"load": "save", "maximum_tokens": 20, "model_parallel_size": 2}
    # Rows for long steps: rank 1 then mostly stops within one.
    training = Run(folder / "trains", {"data_path": dataset, "train_batch_size": 128})
    writing = Run(folder / "writes", settings, "generate.py")
    try:
        training.reach(3)
        texts = writing.folder / "texts.jsonl"
        writing.wait(lambda: texts.exists() and texts.stat().st_size > 0)
        families = [run.family() for run in (training, writing)]
        for run in (training, writing):
            run.worker(1).send_signal(signal.SIGSTOP)
        yield {
            "trains": (training, training.end(LIMIT + 40, families[0])),
            "writes": (writing, writing.end(LIMIT + 40, families[1])),
        }
    finally:
        for run in (training, writing):
            run.stop()


def test_a_frozen_rank_is_named(frozen: dict[str, tuple[Run, int]]) -> None:
    run, code = frozen["trains"]
    said = run.said()
    assert code == 1, said
    assert "rank 1 (host " in said and "no heartbeat for" in said, said
    assert re.search(r"a collective failed at iteration \d+ \((training|reading data|between two steps)\)", said), said
    record = json.loads((run.folder / "logs" / "failures" / "rank_0.json").read_text())
    assert record["entries"][-1]["profiling_name"].startswith("gloo:")


def test_a_frozen_rank_of_a_model_that_writes_is_named(frozen: dict[str, tuple[Run, int]]) -> None:
    run, code = frozen["writes"]
    said = run.said()
    assert code == 1, said
    assert "rank 1 (host " in said and "no heartbeat for" in said, said
    assert "a collective failed (asking the model)" in said, said
    assert (run.folder / "logs" / "generate" / "failures" / "rank_0.json").exists()


def hanging_rank(rank: int, world_size: int, settings: dict[str, Any]) -> None:
    """A worker; rank 1 never gets its 20th micro-batch."""
    read, count = BatchLoader._read, itertools.count(1)

    def sometimes(loader: BatchLoader, numbers: range) -> Any:
        if rank == 1 and next(count) == 20:
            time.sleep(600)
        return read(loader, numbers)

    BatchLoader._read = sometimes  # type: ignore[method-assign]
    run_rank(rank, world_size, settings)


def test_a_rank_that_hangs_over_its_data_says_so_itself(dataset: str, tmp_path: Path) -> None:
    """Its main thread is stuck, and no collective of its own could time out."""
    settings = {**BASE, "train_iters": 100000, "collective_timeout": 5.0, "data_path": dataset, "eval_iters": 0}
    with pytest.raises(RankFailedError) as failure:
        run_distributed(hanging_rank, 2, {**settings, "log_dir": str(tmp_path / "logs")}, timeout=100)
    said = str(failure.value)
    assert "rank 1 (host" in said and "reading data for" in said and "at sometimes (" in said, said
    stacks = (tmp_path / "logs" / "failures" / "rank_1.txt").read_text()
    assert "in sometimes" in stacks


def killed_again_and_again(dataset: str, folder: Path, kills: int, iterations: int) -> None:
    """Kills random ranks of one run that may restart so often; its records must equal those of a run left alone."""
    chance = random.Random(kills + 6)
    folder.joinpath("killed").mkdir()
    settings = {"data_path": dataset, "train_iters": iterations, "max_restarts": kills, "save": "save"}
    settings |= {"checkpoint_factor": 5, "log_dir": "logs", "zero_optimization": {"stage": 1}, "eval_interval": 10}
    run = Run(folder / "killed", settings)
    for number in range(kills):
        run.reach(iterations * number // kills + chance.randrange(1, iterations // kills))
        run.worker(chance.randrange(2)).send_signal(signal.SIGKILL)
        while run.said().count("failed first, with signal SIGKILL") <= number:
            time.sleep(0.05)
    assert run.end(300) == 0, run.said()
    assert run.said().count("from its newest checkpoint") + run.said().count("from its beginning") == kills
    plain = {name: value for name, value in settings.items() if name not in {"log_dir", "save"}}
    full = train_alone(2, folder / "whole", **plain)
    records = read_metrics(folder / "killed" / "logs" / "metrics.jsonl")
    for name in ("train/lm_loss", "train/learning_rate", "train/grad_norm", "validation/lm_loss"):
        assert series(records, name) == series(full, name), name


def test_a_run_that_was_killed_equals_one_that_was_not(dataset: str, tmp_path: Path) -> None:
    killed_again_and_again(dataset, tmp_path, kills=1, iterations=20)


@pytest.mark.long
def test_a_run_that_was_killed_twenty_times_equals_one_that_was_not(dataset: str, tmp_path: Path) -> None:
    killed_again_and_again(dataset, tmp_path, kills=20, iterations=400)
