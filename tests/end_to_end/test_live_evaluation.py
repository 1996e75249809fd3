"""Tasks scored while a model trains: at every validation, alike on every layout, without touching the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.training import loop
from tests.end_to_end.runs import BASE, make_dataset, run, run_rank, series
from tests.multi_rank import RankFailedError, run_distributed

TASK = """
task: small_cloze
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
SETTINGS: dict[str, Any] = {"train_iters": 6, "eval_interval": 3, "eval_iters": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("live")
    make_dataset(path)
    documents = [
        {"question": f"def f{number}(", "choices": ["self)", "zqj%"], "answer": number % 2} for number in range(7)
    ]
    (path / "documents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
    (path / "cloze.yaml").write_text(TASK.format(data=path / "documents.jsonl"), encoding="utf-8")
    return path


def train(folder: Path, to: Path, world_size: int, **others: Any) -> list[dict[str, float]]:
    to.mkdir()
    tasks = {"eval_tasks": ["small_cloze"], "eval_include_path": str(folder), "eval_batch_size": 3}
    return run(world_size, to, data_path=str(folder / "text"), **{**SETTINGS, **tasks, **others})


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, float]]:
    return train(folder, folder / "alone", 1)


def test_scores_come_at_every_validation_and_change_nothing(folder: Path, alone: list[dict[str, float]]) -> None:
    assert [record["iteration"] for record in alone if "eval/small_cloze_acc" in record] == [3, 6]
    without = train(folder, folder / "without", 1, eval_tasks=None)
    assert series(without, "train/lm_loss") == series(alone, "train/lm_loss")
    assert series(without, "eval/small_cloze_acc") == []


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, {}),
        (2, {"pipe_parallel_size": 2}),
        (2, {"model_parallel_size": 2}),
        (2, {"zero_optimization": {"stage": 3}}),
    ],
    ids=["data 2", "pipeline 2", "tensor 2", "ZeRO 3"],
)
def test_every_layout_scores_the_same(
    folder: Path, tmp_path: Path, alone: list[dict[str, float]], world_size: int, layout: dict[str, Any]
) -> None:
    found = train(folder, tmp_path / "run", world_size, **layout)
    assert series(found, "eval/small_cloze_acc") == series(alone, "eval/small_cloze_acc")


def failing_rank(rank: int, world_size: int, settings: dict[str, Any]) -> None:
    """A worker whose evaluation runs out of memory on one rank."""

    def fails(*_: Any) -> bool:
        if rank == 1:
            raise torch.OutOfMemoryError("no evaluation")
        return loop_evaluate(*_)

    loop_evaluate, loop.evaluate = loop.evaluate, fails
    run_rank(rank, world_size, settings)


@pytest.mark.parametrize("iters", [3, 6])
def test_an_evaluation_that_failed_loses_no_training_and_is_made_up(folder: Path, tmp_path: Path, iters: int) -> None:
    """At the end of the run, and at an interval."""
    settings = {**BASE, **SETTINGS, "train_iters": iters, "checkpoint_factor": 3 if iters > 3 else 1000}
    settings |= {"data_path": str(folder / "text"), "save": str(tmp_path / "save"), "load": str(tmp_path / "save")}
    with pytest.raises(RankFailedError, match="no evaluation"):
        run_distributed(failing_rank, 2, {**settings, "log_dir": str(tmp_path / "logs")})
    assert (tmp_path / "save" / "latest").read_text() == "global_step3"
    resumed = run(2, tmp_path, **settings)
    undisturbed = run(2, tmp_path / "undisturbed", **{**settings, "save": None, "load": None})
    for name in ("train/lm_loss", "validation/lm_loss", "test/lm_loss", "iteration"):
        assert series(resumed, name) == series(undisturbed, name), name


def test_a_task_that_fails_ends_no_training(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def own(doc, results):\n    return {'acc': int('five')}\n")
    text = TASK.format(data=folder / "documents.jsonl").replace("small_cloze", "small_failing")
    (tmp_path / "failing.yaml").write_text(f"{text}process_results: !function own.own\n")
    others = {"eval_tasks": ["small_failing"], "eval_include_path": str(tmp_path)}
    found = train(folder, tmp_path / "run", 1, save=str(tmp_path / "save"), checkpoint_factor=6, **others)
    assert len(series(found, "train/lm_loss")) == 6 and not series(found, "eval/small_failing_acc")
    assert (tmp_path / "save" / "latest").read_text() == "global_step6"
