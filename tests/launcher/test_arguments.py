"""argv -> Request: every form that the command line takes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.errors import ConfigError
from megatron.launcher.arguments import CHECKOUT, read_request, wants_help


def test_script_files_and_keys_in_any_spelling() -> None:
    request = read_request(
        ["train.py", "a.yml", "b", "--train-iters", "100", "--hidden_size=64", "--optimizer", "{type: Adam}"]
    )
    assert request.script == CHECKOUT / "train.py"
    assert request.files == ("a.yml", "b")
    assert request.flags == {
        "train_iters": 100,
        "hidden_size": 64,
        "optimizer": {"type": "Adam"},
        "user_script": "train.py",
    }
    assert not request.dry_run
    assert not request.as_json


def test_the_folder_of_the_files_and_the_public_short_flags() -> None:
    request = read_request(
        ["generate.py", "-d", "configs", "a", "-i", "in.txt", "-o", "out.jsonl", "-H", "hosts", "b.yml"]
    )
    assert request.files == ("configs/a", "configs/b.yml")
    assert request.flags["sample_input_file"] == "in.txt"
    assert request.flags["sample_output_file"] == "out.jsonl"
    assert request.flags["hostfile"] == "hosts"


def test_tasks_iteration_autotuning_and_switches() -> None:
    request = read_request(
        [
            "evaluate.py",
            "a",
            "--iteration",
            "7",
            "--autotuning",
            "tune",
            "--strict-config",
            "--dry-run",
            "--json",
            "--eval_tasks",
            "x",
            "y",
        ]
    )
    assert request.flags["eval_tasks"] == ["x", "y"]
    assert request.flags["iteration"] == 7
    assert request.flags["autotuning_run"] == "tune"
    assert request.flags["strict_config"] is True
    assert request.dry_run
    assert request.as_json


def test_a_flag_of_json_text_is_not_taken_for_a_switch() -> None:
    assert read_request(["train.py", "a", "--comment", "json"]).flags["comment"] == "json"


@pytest.mark.parametrize(
    ("line", "reported"),
    [
        ("train.py a --train-itres 3", "did you mean --train_iters?"),
        ("train.py a -x", "there is no such flag"),
        ("trian.py a", "there is no such script"),
        ("eval.py a", "evaluate.py"),
        ("README_or_config.yml train.py", "there is no such script"),
        ("--train-iters 3", "no script is named"),
        ("train.py a --autotuning maybe", "tune or run"),
        ("train.py a -d", "needs a value"),
    ],
)
def test_issues(line: str, reported: str) -> None:
    """Those of flags wait for those of the files; without a script there is nothing more to find."""
    try:
        issues = read_request(line.split()).issues
    except ConfigError as error:
        issues = error.issues
    assert len(issues) == 1
    assert reported in str(issues[0])


def test_a_configuration_in_the_position_of_the_script(tmp_path: Path) -> None:
    (tmp_path / "small.yml").write_text("{}")
    with pytest.raises(ConfigError, match="the script comes first"):
        read_request([str(tmp_path / "small.yml"), "train.py"])


def test_a_script_that_is_no_worker_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plot.py").write_text("print('hello')\n")
    with pytest.raises(ConfigError, match="the script is no worker"):
        read_request([str(tmp_path / "plot.py"), "a.yml"])


def test_help() -> None:
    assert wants_help([])
    assert wants_help(["train.py", "--help"])
    assert not wants_help(["train.py"])
