"""A stop that is asked for during an evaluation gives the evaluation up; the run saves and leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config import Resources, resolve
from megatron.metrics.sinks.jsonl import read_metrics
from megatron.training.trainer import train
from tests.end_to_end.runs import BASE, make_dataset, run, series
from tests.multi_rank import run_distributed

STEPS = 4  # until the evaluation


class StopDuringEvaluation:
    """Asks for it on one rank, after the evaluation has begun: each step looks once, each batch of it once."""

    def __init__(self, asked: bool) -> None:
        self.looks = 0
        self.asked = asked

    @property
    def requested(self) -> bool:
        self.looks += 1
        return self.asked and self.looks > STEPS + 1

    def listen(self) -> None:
        pass


def require_the_evaluation_at_the_resume(settings: dict[str, Any], folder: Path, metric: str) -> None:
    """Ends the run at the iteration whose evaluation was given up: all that is left is that evaluation."""
    settings = {**settings, "load": settings["save"], "train_iters": STEPS, "override_lr_scheduler": True}
    settings |= {"override_data_order": True}
    world_size = max(1, settings.get("pipe_parallel_size", 1), settings.get("num_gpus", 1))
    for _ in range(2):
        records = run(world_size, folder, **settings)
        assert [int(record["iteration"]) for record in records if metric in record] == [STEPS]
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    assert sum(metric in line for line in lines) == 1  # the second resume has nothing left to evaluate


def stopped_rank(rank: int, world_size: int, settings: dict[str, Any]) -> None:
    stop = StopDuringEvaluation(asked=rank == world_size - 1)
    train(resolve([], settings, Resources(world_size)).config, stop)
    assert stop.looks < STEPS + 10  # not all the batches of the evaluation


@pytest.mark.parametrize("layout", [{}, {"pipe_parallel_size": 2}], ids=["one process", "pipeline 2"])
def test_a_stop_during_an_evaluation_saves_at_once(layout: dict[str, Any], tmp_path: Path) -> None:
    settings = {
        **BASE,
        "data_path": make_dataset(tmp_path),
        "eval_interval": STEPS,
        "eval_iters": 40,
        "log_dir": str(tmp_path / "logs"),
        "save": str(tmp_path / "save"),
        "checkpoint_factor": 100,
        **layout,
    }
    run_distributed(stopped_rank, max(1, layout.get("pipe_parallel_size", 1)), settings)
    records = read_metrics(tmp_path / "logs" / "metrics.jsonl")
    assert series(records, "validation/lm_loss") == []
    assert max(record["iteration"] for record in records) in (STEPS - 1, STEPS)
    assert (tmp_path / "save" / "latest").read_text() == f"global_step{int(max(r['iteration'] for r in records))}"
    require_the_evaluation_at_the_resume(settings, tmp_path, "validation/lm_loss")


TASK = """
task: long_cloze
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["self)", "zqj%"]
doc_to_target: 0
metric_list:
  - metric: acc
"""
DOCUMENTS = 60


class StopDuringTasks(StopDuringEvaluation):
    """Asks for it after the look of each step and those of the validation."""

    @property
    def requested(self) -> bool:
        self.looks += 1
        return self.asked and self.looks > STEPS + 2


def stopped_in_tasks(rank: int, world_size: int, settings: dict[str, Any]) -> None:
    stop = StopDuringTasks(asked=rank == 0)
    train(resolve([], settings, Resources(world_size)).config, stop)
    assert stop.looks < STEPS + 12


@pytest.mark.parametrize(
    "layout",
    [{}, {"pipe_parallel_size": 2}, {"num_gpus": 2}, {"zero_optimization": {"stage": 3}, "num_gpus": 2}],
    ids=["one process", "pipeline 2", "data 2", "ZeRO 3"],
)
def test_a_stop_while_tasks_are_scored_saves_at_once(layout: dict[str, Any], tmp_path: Path) -> None:
    documents = [json.dumps({"question": f"def f{number}("}) for number in range(DOCUMENTS)]
    (tmp_path / "documents.jsonl").write_text("\n".join(documents) + "\n", encoding="utf-8")
    (tmp_path / "cloze.yaml").write_text(TASK.format(data=tmp_path / "documents.jsonl"), encoding="utf-8")
    world_size = max(layout.get("pipe_parallel_size", 1), layout.get("num_gpus", 1))
    settings = {
        **BASE,
        "data_path": make_dataset(tmp_path),
        "eval_interval": STEPS,
        "eval_iters": 1,
        "eval_tasks": ["long_cloze"],
        "eval_include_path": str(tmp_path),
        "eval_batch_size": 1,
        "log_dir": str(tmp_path / "logs"),
        "save": str(tmp_path / "save"),
        "checkpoint_factor": 100,
        **layout,
    }
    run_distributed(stopped_in_tasks, world_size, settings)
    records = read_metrics(tmp_path / "logs" / "metrics.jsonl")
    assert series(records, "eval/long_cloze_acc") == []
    assert len(series(records, "validation/lm_loss")) == 1
    assert (tmp_path / "save" / "latest").read_text() == f"global_step{STEPS}"
    require_the_evaluation_at_the_resume(settings, tmp_path, "eval/long_cloze_acc")
