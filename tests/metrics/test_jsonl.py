"""metrics.jsonl: what is written is what a reader gets, through kills and resumes."""

import json
import math
from types import SimpleNamespace

import pytest

from megatron.errors import ConfigError
from megatron.metrics.sinks.base import Start
from megatron.metrics.sinks.jsonl import JsonLines, read_metrics


def write(path, *records):
    sink = JsonLines(path)
    for iteration, metrics in records:
        sink.write(iteration, metrics)
    sink.close()


def test_each_record_is_one_json_line_on_disk_before_close(tmp_path):
    sink = JsonLines(tmp_path / "run" / "metrics.jsonl")
    sink.write(10, {"train/lm_loss": 2.5, "consumed_tokens": 4096})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"iteration": 10, "train/lm_loss": 2.5, "consumed_tokens": 4096}]
    sink.close()


def test_a_resumed_run_appends_and_the_later_line_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, *[(i, {"train/lm_loss": 10.0 + i}) for i in range(1, 16)])
    write(path, *[(i, {"train/lm_loss": 20.0 + i}) for i in range(11, 14)])
    assert len(path.read_text().splitlines()) == 18
    assert [(r["iteration"], r["train/lm_loss"]) for r in read_metrics(path)] == [
        *[(i, 10.0 + i) for i in range(1, 11)],
        *[(i, 20.0 + i) for i in range(11, 14)],  # 14 and 15 belong to the branch that was left
    ]


def test_training_and_validation_of_one_iteration_are_one_record(tmp_path):
    write(tmp_path / "metrics.jsonl", (5, {"train/lm_loss": 3.0}), (5, {"validation/lm_loss": 3.5}))
    assert read_metrics(tmp_path) == [{"iteration": 5, "train/lm_loss": 3.0, "validation/lm_loss": 3.5}]


def test_validation_of_the_branch_that_was_left_is_gone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, (10, {"train/lm_loss": 3.0}), (12, {"train/lm_loss": 2.9}), (12, {"validation/lm_loss": 3.5}))
    write(path, (11, {"train/lm_loss": 2.8}))
    assert [r["iteration"] for r in read_metrics(path)] == [10, 11]


def test_a_training_record_without_a_loss_drops_what_was_left(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, (10, {"train/lm_loss": 3.0}), (12, {"train/lm_loss": 2.9}), (11, {"train/learning_rate": 0.1}))
    assert [r["iteration"] for r in read_metrics(path)] == [10, 11]


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, (1, {"train/lm_loss": math.nan, "train/grad_norm": math.inf}))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["train/lm_loss"] is None
    assert math.isnan(read_metrics(path)[0]["train/grad_norm"])


def test_a_torn_last_line_is_left_out_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, (1, {"train/lm_loss": 3.0}))
    with path.open("a") as file:
        file.write('{"iteration": 2, "train/lm_')
    write(path, (3, {"train/lm_loss": 2.0}))
    assert [r["iteration"] for r in read_metrics(path)] == [1, 3]


def test_without_a_run_directory_it_names_the_key():
    with pytest.raises(ConfigError, match="log_dir"):
        JsonLines.open(SimpleNamespace(log_dir=None, tensorboard_dir=None), Start())


def test_reading_what_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path)
