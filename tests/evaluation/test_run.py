"""Around the tasks: the results file, what is checked before a model is loaded, and the lines about progress."""

import importlib.util
import json
import math
import time

import numpy
import pytest
import torch

from megatron.distributed.mesh import Topology
from megatron.errors import ConfigError
from megatron.evaluation import runner
from megatron.evaluation.progress import Progress
from megatron.evaluation.tasks import Tasks
from megatron.inference.scoring import NotNumbers
from megatron.tokenizers.char_level import CharLevelTokenizer
from tests.inference.small_model import small_config


def test_the_file_name_is_the_public_one():
    moment = time.struct_time((2026, 3, 9, 14, 5, 6, 0, 0, 0))
    assert str(runner.results_path("", moment)) == "eval_results_03-09-2026-14-05-06.json"
    assert str(runner.results_path("out/pythia", moment)) == "out/pythia_eval_results_03-09-2026-14-05-06.json"


def test_the_record_says_how_the_scores_came_about():
    config = small_config(eval_limit=3, eval_batch_size=8)
    results = {"results": {"a": {"acc,none": 0.5}}, "versions": {"a": 1}, "samples": {"a": [object()]}}
    record = json.loads(json.dumps(runner.results_record(config, results)))
    assert record["results"] == results["results"] and record["versions"] == results["versions"]
    assert "samples" not in record
    assert record["config"]["batch_size"] == 8 and record["config"]["limit"] == 3
    assert record["config"]["model_args"]["hidden_size"] == 32
    assert "git_hash" in record
    secret = runner.results_record(config.replace(serve_key="hunter2"), results)
    assert "hunter2" not in json.dumps(secret) and secret["config"]["model_args"]["serve_key"] is None


def test_what_is_no_number_is_null_in_the_file(tmp_path):
    record = {"acc": math.nan, 3: [math.inf, (numpy.float32("nan"), numpy.float64(0.5))], "ok": True, "size": 7}
    runner._write(tmp_path / "deep" / "results.json", record)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads((tmp_path / "deep" / "results.json").read_text(), parse_constant=refuse)
    assert read == {"acc": None, "3": [None, [None, 0.5]], "ok": True, "size": 7}


def test_numbers_of_numpy_are_numbers_in_files_and_metrics(tmp_path):
    numbers = {"f,none": numpy.float32(0.25), "i,none": numpy.int64(3), "b,none": numpy.bool_(True), "h,none": 1}
    other = {"array": numpy.arange(2), "seen": {"x"}, "whole": torch.tensor(2), "zero": numpy.array(0.5)}
    runner._write(tmp_path / "results.json", {"results": {"a": {**numbers, **other}}})
    read = json.loads((tmp_path / "results.json").read_text())["results"]["a"]
    assert read == {"f,none": 0.25, "i,none": 3, "b,none": True, "h,none": 1, **read}
    assert read["b,none"] is True and isinstance(read["i,none"], int)
    assert read["array"] == [0, 1] and read["seen"] == ["x"] and read["whole"] == 2 and read["zero"] == 0.5
    flat = runner.flat_metrics({"results": {"a": {**numbers, "f_stderr,none": "N/A", "sample_len": numpy.int64(7)}}})
    assert flat == {"eval/a_f": 0.25, "eval/a_i": 3.0, "eval/a_b": 1.0, "eval/a_h": 1.0}


class SamplesTasks:
    """Tasks that give a score and what lm-eval has of each document."""

    def run(self, model, documents=None, **arguments):
        samples = [{"doc": {"é": 1}, "resps": [["x"]], "acc": math.nan}, {"doc": {}, "acc": 1.0}]
        return {"results": {"a/b": {"acc": 0.5}}, "samples": {"a/b": samples}}


@pytest.mark.parametrize("asked", [None, {"log_samples": False}, {"log_samples": True}])
def test_samples_are_written_where_they_are_asked_for(tmp_path, asked):
    config = small_config(eval_tasks=["a"], eval_model_args=asked, eval_results_prefix=str(tmp_path / "out" / "x"))
    runner._run_tasks(config, SamplesTasks(), None, Topology.single())
    files = list(tmp_path.glob("out/*"))
    assert len(files) == (1 if asked and asked["log_samples"] else 0)
    for file in files:
        assert file.name.startswith("x_eval_samples_a_b_") and file.suffix == ".jsonl"
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert lines == [{"doc": {"é": 1}, "resps": [["x"]], "acc": None}, {"doc": {}, "acc": 1.0}]


def test_a_training_goes_on_where_its_model_cannot_be_scored(monkeypatch, caplog):
    def fails(*_):
        raise NotNumbers.of("3 of 3 answers have no score")

    monkeypatch.setattr(runner, "_load_tasks", lambda config: (None, None))
    monkeypatch.setattr(runner, "_harness_model", lambda *_, **__: None)
    monkeypatch.setattr(runner, "_run_tasks", fails)
    config = small_config(eval_tasks=["any"])
    scored = runner.live_evaluation(config, None, CharLevelTokenizer(), Topology.single(), stop_requested=lambda: False)
    assert scored() == {}
    assert "3 of 3 answers have no score" in caplog.text


def test_a_limit_among_the_arguments_of_the_harness_is_refused():
    tasks = object.__new__(Tasks)
    with pytest.raises(ConfigError, match="eval_limit: 3"):
        tasks.run(None, limit=3)


def test_without_tasks_or_harness_nothing_starts(monkeypatch):
    with pytest.raises(ConfigError, match="--eval_tasks"):
        runner.evaluate(small_config())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"neox\[eval\]"):
        runner.evaluate(small_config(eval_tasks=["arc_easy"]))


def test_progress_reports_every_ten_seconds():
    now, said = [0.0], []
    progress = Progress("scoring", said.append, lambda: now[0])
    for second in range(26):
        now[0] = float(second)
        progress(second / 50)
    assert said == ["scoring: 20 %, 40s left", "scoring: 40 %, 30s left"]
