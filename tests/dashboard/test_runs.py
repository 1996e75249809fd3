"""Data of run directories for the dashboard page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.dashboard.runs import differences, downsample, open_runs, snapshot
from megatron.errors import ConfigError
from tests.dashboard.folders import make_run


def test_a_run_is_read_and_read_again_when_it_grows(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", iterations=3)
    (run,) = open_runs([folder])
    assert [iteration for iteration, _ in run.curves()["train/lm_loss"]] == [1, 2, 3]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "train/lm_loss": 2.5}\n{"iteration": 5, "train/lm_lo')  # a torn line
    assert run.curves()["train/lm_loss"][-1] == (4, 2.5)
    assert run.ranks()["probe"] == [0.001, 0.002]
    age = run.age()
    assert age is not None and age < 60


def test_a_save_folder_leads_to_its_logs(tmp_path: Path) -> None:
    make_run(tmp_path / "save" / "logs")
    (run,) = open_runs([tmp_path / "save"])
    assert run.name == "save"


def test_names_report_runs_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / parent / "run") for parent in ("a", "b")]
    assert [run.name for run in open_runs(folders)] == ["a/run", "b/run"]


def test_a_run_in_the_logs_of_another_has_its_full_path_for_a_name(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "run"), make_run(tmp_path / "run" / "logs")]
    assert [run.name for run in open_runs([tmp_path / "run", tmp_path / "run" / "logs"])] == list(map(str, folders))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "[1]"),
        ("config.json", "{"),
        ("ranks.jsonl", "\n\n"),
        ("ranks.jsonl", "7\n"),
        ("metrics.jsonl", '{"iteration": 1, "x": null}\n{"iteration": 2, "x": 1.0, "y": NaN, "z": "text"}\n'),
        ("metrics.jsonl", '{"x": 1}\n'),
    ],
)
def test_files_that_are_not_as_a_run_writes_them_leave_the_rest_to_be_shown(
    name: str, text: str, tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "run")
    (folder / name).write_text(text)
    shown = snapshot(open_runs([folder]))
    assert [run["name"] for run in shown["runs"]] == ["run"]
    json.dumps(shown, allow_nan=False)


def test_a_folder_without_a_run_is_a_issue(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds neither"):
        open_runs([tmp_path])


def test_a_run_that_has_only_started_is_shown_empty(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    shown = snapshot(open_runs([tmp_path]))
    assert shown["runs"][0]["curves"] == {} and shown["runs"][0]["age"] is None
    json.dumps(shown)


def test_only_keys_that_differ_are_reported() -> None:
    first = {"hidden_size": 64, "lr": 0.1, "save": "a"}
    second = {"hidden_size": 64, "lr": 0.2, "save": "b", "new": True}
    assert differences([first, second]) == [
        {"key": "lr", "values": [0.1, 0.2]},
        {"key": "new", "values": [None, True]},
    ]
    assert differences([first]) == []


def test_thinning_keeps_ends_and_spikes() -> None:
    points = [(iteration, 1.0) for iteration in range(100_000)]
    points[54_321] = (54_321, 99.0)
    points[77_777] = (77_777, -5.0)
    retained = downsample(points)
    assert len(retained) <= 1500 and (54_321, 99.0) in retained and (77_777, -5.0) in retained
    assert retained == sorted(retained)
    assert downsample(points[:100]) == points[:100]
