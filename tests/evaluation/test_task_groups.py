"""Which tasks are loaded where groups, tags and wildcards name some of them several times."""

import json
import logging
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from megatron.errors import RunError
from megatron.evaluation.tasks import Tasks

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: 0
metric_list:
  - metric: acc
"""
GROUPS = """
group: small_all
task:
  - small_pair
  - task: small_rolling
  - group: small_inner
    task: [small_one]
aggregate_metric_list:
  - metric: acc
"""
ALL = {"small_choice", "small_writing", "small_rolling", "small_one"}


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """small_all holds the group small_pair, which holds two tasks, and the tag small_tag has one of these."""
    path = tmp_path_factory.mktemp("groups")
    (path / "data.jsonl").write_text(json.dumps({"question": "Is it?"}) + "\n")
    (path / "all.yaml").write_text(GROUPS)
    (path / "pair.yaml").write_text("group: small_pair\ntask: [small_choice, small_writing]\n")
    (path / "top.yaml").write_text("group: top_pair\ntask: [small_pair]\n")
    (path / "same.yaml").write_text("group: same_pair\ntask: [small_choice, small_writing]\n")
    (path / "other.yaml").write_text("group: other_pair\ntask: [small_choice, small_one]\n")
    for name in (*ALL, "small_free"):
        tag = "tag: small_tag\n" if name in ("small_choice", "small_free") else ""
        (path / f"{name}.yaml").write_text(TASK.format(name=name, data=path / "data.jsonl") + tag)
    return path


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


@pytest.mark.parametrize(
    ("names", "tasks", "kinds"),
    [
        (["small_*"], ALL | {"small_free"}, {"small_all", "small_pair", "small_all::small_inner"}),
        (["small_choice", "small_pair"], {"small_choice", "small_writing"}, {"small_pair"}),
        (["small_pair", "small_all"], ALL, {"small_all", "small_pair", "small_all::small_inner"}),
        (["small_tag", "small_pair"], {"small_choice", "small_writing", "small_free"}, {"small_pair"}),
        (["small_tag", "small_free"], {"small_choice", "small_free"}, set()),
        (["small_choice", "small_choice"], {"small_choice"}, set()),
        (["small_pair", "top_pair"], {"small_choice", "small_writing"}, {"small_pair", "top_pair"}),
        (["top_pair", "small_pair"], {"small_choice", "small_writing"}, {"small_pair", "top_pair"}),
    ],
)
def test_a_task_that_is_named_alone_and_in_a_group_is_scored_once(groups, names, tasks, kinds):
    loaded = Tasks(names, str(groups))._loaded
    assert set(loaded["tasks"]) == tasks and set(loaded["groups"]) == kinds


@pytest.mark.parametrize("names", [["small_pair", "same_pair"], ["small_all", "other_pair"]])
def test_a_group_whose_tasks_another_one_holds_is_not_left_out(groups, names):
    """Their scores are others, as by other weights, so that both are asked for."""
    with pytest.raises(RunError, match="in evaluations of their own"):
        Tasks(names, str(groups))


def test_a_wildcard_takes_the_fuller_of_two_groups_and_says_so(groups, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron"), "propagate", True)
    loaded = Tasks(["s*_all", "same*"], str(groups))._loaded
    assert set(loaded["groups"]) == {"small_all", "small_pair", "small_all::small_inner"}
    assert "the group same_pair is left out: the group small_all has all its tasks" in caplog.text


def test_groups_that_share_a_task_are_reported_without_talk_of_the_network(groups):
    with pytest.raises(RunError, match=r"small_choice.*in evaluations of their own") as caught:
        Tasks(["small_pair", "other_pair"], str(groups))
    assert "offline" not in str(caught.value)
