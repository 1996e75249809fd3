"""Around the tasks: the results file, what is checked before a model is loaded, and the lines about progress."""

import importlib.util
import json
import math
import os
import time
from types import SimpleNamespace

import numpy
import pytest
import torch

from megatron.distributed.mesh import Topology
from megatron.errors import ConfigError
from megatron.evaluation import runner
from megatron.evaluation.harness_arguments import check_arguments
from megatron.evaluation.progress import Progress
from megatron.evaluation.results_file import require_writable, results_path, write_json, write_results
from megatron.inference.scoring import NotNumbers
from megatron.tokenizers.char_level import CharLevelTokenizer
from tests.inference.small_model import small_config


def test_the_file_name_is_the_public_one():
    moment = time.struct_time((2026, 3, 9, 14, 5, 6, 0, 0, 0))
    assert str(results_path("", moment)) == "eval_results_03-09-2026-14-05-06.json"
    assert str(results_path("out/pythia", moment)) == "out/pythia_eval_results_03-09-2026-14-05-06.json"


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
    write_json(tmp_path / "deep" / "results.json", record)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads((tmp_path / "deep" / "results.json").read_text(), parse_constant=refuse)
    assert read == {"acc": None, "3": [None, [None, 0.5]], "ok": True, "size": 7}


def test_numbers_of_numpy_are_numbers_in_files_and_metrics(tmp_path):
    numbers = {"f,none": numpy.float32(0.25), "i,none": numpy.int64(3), "b,none": numpy.bool_(True), "h,none": 1}
    other = {"array": numpy.arange(2), "seen": {"x"}, "whole": torch.tensor(2), "zero": numpy.array(0.5)}
    write_json(tmp_path / "results.json", {"results": {"a": {**numbers, **other}}})
    read = json.loads((tmp_path / "results.json").read_text())["results"]["a"]
    assert read == {"f,none": 0.25, "i,none": 3, "b,none": True, "h,none": 1, **read}
    assert read["b,none"] is True and isinstance(read["i,none"], int)
    assert read["array"] == [0, 1] and read["seen"] == ["x"] and read["whole"] == 2 and read["zero"] == 0.5
    flat = runner.flat_metrics({"results": {"a": {**numbers, "f_stderr,none": "N/A", "sample_len": numpy.int64(7)}}})
    assert flat == {"eval/a_f": 0.25, "eval/a_i": 3.0, "eval/a_b": 1.0, "eval/a_h": 1.0}


SAMPLED = {
    "results": {"a/b": {"acc": 0.5}},
    "samples": {"a/b": [{"doc": {"é": 1}, "resps": [["x"]], "acc": math.nan}, {"doc": {}, "acc": 1.0}]},
}
"""A score, and what lm-eval has of each document."""


@pytest.mark.parametrize("asked", [None, {"log_samples": False}, {"log_samples": True}])
def test_samples_are_written_where_they_are_asked_for(tmp_path, asked):
    config = small_config(eval_tasks=["a"], eval_model_args=asked, eval_results_prefix=str(tmp_path / "out" / "x"))
    runner._write_samples(config, SAMPLED)
    files = list(tmp_path.glob("out/*"))
    assert len(files) == (1 if asked and asked["log_samples"] else 0)
    for file in files:
        assert file.name.startswith("x_eval_samples_a_b_") and file.suffix == ".jsonl"
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert lines == [{"doc": {"é": 1}, "resps": [["x"]], "acc": None}, {"doc": {}, "acc": 1.0}]


def test_a_training_goes_on_where_its_model_cannot_be_scored(monkeypatch, caplog):
    def fails(*_):
        assert os.environ["DISABLE_MULTIPROC"] == "1"  # no pool of forks that handle signals as this rank does
        raise NotNumbers.of("3 of 3 answers have no score")

    monkeypatch.setattr(runner, "_load_tasks", lambda config: (None, None))
    monkeypatch.setattr(runner, "_harness_model", lambda *_, **__: None)
    monkeypatch.setattr(runner, "_run_tasks", fails)
    config = small_config(eval_tasks=["any"])
    scored = runner.live_evaluation(config, None, CharLevelTokenizer(), Topology.single(), stop_requested=lambda: False)
    assert scored() == {}
    assert "3 of 3 answers have no score" in caplog.text


def test_evaluations_that_end_in_one_second_have_files_of_their_own(tmp_path, monkeypatch):
    moment = time.struct_time((2026, 3, 9, 14, 5, 6, 0, 0, 0))
    monkeypatch.setattr(time, "localtime", lambda: moment)
    for number in range(3):
        write_results(str(tmp_path / "x"), {"number": number})
    names = [f"x_eval_results_03-09-2026-14-05-06{end}.json" for end in ("", "-2", "-3")]
    assert [json.loads((tmp_path / name).read_text())["number"] for name in names] == [0, 1, 2]


def test_results_that_cannot_be_written_are_reported_before_any_work(tmp_path):
    require_writable(str(tmp_path / "new" / "x"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="eval_results_prefix"):
        runner.evaluate(small_config(eval_tasks=["none"], eval_results_prefix=str(tmp_path / "file" / "x")))


TASKS = {"small": SimpleNamespace(eval_docs=["a", "b", "c"]), "other": SimpleNamespace(eval_docs=["a"])}


@pytest.mark.parametrize(
    ("samples", "expected"),
    [({"small": [2, 0]}, [0, 2]), ({"small": [1, 1, 2]}, [1, 2]), ({"small": (1,)}, [1])],
    ids=["unsorted", "twice", "one"],
)
def test_chosen_documents_are_in_order_and_once(samples, expected):
    """lm-eval gives the records of an unsorted list the numbers of other documents."""
    assert check_arguments({"samples": samples}, TASKS, None) == {"samples": {"small": expected}}


@pytest.mark.parametrize(
    ("arguments", "documents", "reason"),
    [
        ({"limit": 3}, None, "eval_limit: 3"),
        ({"samples": {"smal": [1]}}, None, "samples names smal, which is not scored"),
        ({"samples": {"small": []}}, None, "samples of small is empty"),
        ({"samples": {"small": [3]}}, None, "small has no document 3"),
        ({"samples": {"small": [-1]}}, None, "small has no document -1"),
        ({"samples": {"small": [True]}}, None, "not a list of whole numbers"),
        ({"samples": {"small": 1}}, None, "not a list of whole numbers"),
        ({"samples": [1, 2]}, None, "not a table of tasks"),
        ({"samples": {"small": [1]}}, 2, "both choose documents"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_arguments_of_the_harness_that_cannot_be_followed_are_refused(arguments, documents, reason):
    with pytest.raises(ConfigError, match=reason):
        check_arguments(arguments, TASKS, documents)


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
