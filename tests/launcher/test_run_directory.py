"""The folder that keeps what a run was."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from megatron.config import Config, serialize
from megatron.errors import RunError
from megatron.launcher.arguments import read_request
from megatron.launcher.cli import build_command, find_rendezvous
from megatron.launcher.resolve import resolve_request
from megatron.launcher.run_directory import choose_run_directory, git_revision, prepare_run_directory
from tests.config.small import SMALL

TRAIN = Path("/somewhere/train.py")


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose_run_directory("here", "elsewhere", ["a.yml"], TRAIN) == tmp_path / "here"
    assert choose_run_directory(None, "saved", ["a.yml"], TRAIN) == tmp_path / "saved/logs"
    named = choose_run_directory(None, None, ["configs/small.yml", "local"], TRAIN)
    assert named.parent == tmp_path / "runs"
    assert re.fullmatch(r"small-local-\d{8}-\d{6}", named.name)


def test_other_scripts_do_not_overwrite_what_trained() -> None:
    assert choose_run_directory("/run", None, [], Path("/x/generate.py")) == Path("/run/generate")


def test_what_it_keeps_and_that_a_restart_appends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    given = Config.from_flat({"train_iters": 1, "config_files": {"a.yml": "train_iters: 1\n"}})
    config = prepare_run_directory(folder, given, ["deepy.py", "train.py", "a.yml"])
    assert config.read_text() == serialize.to_json(given)
    assert (folder / "sources/a.yml").read_text() == "train_iters: 1\n"
    prepare_run_directory(folder, given, ["again"])
    prepare_run_directory(folder, given.replace(train_iters=2), ["once more"])
    assert serialize.read(folder / "config.json").training.train_iters == 2
    assert [path.name for path in folder.glob("config.*.json")] == ["config.1.json"]
    launches = [json.loads(line) for line in (folder / "launches.jsonl").read_text().splitlines()]
    assert [launch["command"] for launch in launches] == [["deepy.py", "train.py", "a.yml"], ["again"], ["once more"]]
    assert launches[0]["packages"]["deepspeed"]
    assert launches[0]["python"].startswith("3.")


def test_a_working_directory_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"d_\xe9") / "run"
    with pytest.raises(RunError, match=r"the run directory's name holds bytes that are not UTF-8; start the run in"):
        prepare_run_directory(folder, Config.from_flat({"log_dir": str(folder)}), [])
    assert not folder.exists()


def test_a_secret_is_in_the_file_of_the_workers_alone(tmp_path: Path) -> None:
    files = {
        "a.yml": 'x: 1\nserve_key: "hunter2"  # for us\n',
        "b.json": '{"serve-key": "hunter2", "train_iters": 1}\n',
    }
    given = Config.from_flat({"serve_key": "hunter2", "config_files": files})
    flags = ["--serve-key", "hunter2", "--train-iters", "1", "--serve_key=hunter2"]
    config = prepare_run_directory(tmp_path, given, flags)
    holders = [path.name for path in tmp_path.rglob("*") if path.is_file() and "hunter2" in path.read_text()]
    assert holders == [config.name] and config.stat().st_mode & 0o077 == 0
    assert serialize.read(config).generation.serve_key == "hunter2"
    (launch,) = [json.loads(line) for line in (tmp_path / "launches.jsonl").read_text().splitlines()]
    assert launch["command"] == ["--serve-key", "(redacted)", "--train-iters", "1", "--serve_key=(redacted)"]
    assert (tmp_path / "sources/a.yml").read_text() == "x: 1\nserve_key: null  # for us\n"
    assert json.loads((tmp_path / "sources/b.json").read_text()) == {"serve-key": None, "train_iters": 1}


def test_a_second_launch_in_the_same_folder_changes_no_worker_s_configuration(tmp_path: Path) -> None:
    """Workers of the first may read theirs seconds later."""
    first, second = (Config.from_flat({"train_iters": number}) for number in (1, 2))
    files = [prepare_run_directory(tmp_path, config, []) for config in (first, second, first)]
    assert [serialize.read(file).training.train_iters for file in files] == [1, 2, 1]
    assert files[0] == files[2] != files[1]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="the run directory cannot be written"):
        prepare_run_directory(tmp_path / "file" / "run", Config.from_flat({}), [])


def test_the_revision_of_a_folder_outside_any_checkout(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None


def started(tmp_path: Path, *flags: str) -> tuple[str, ...]:
    """The command line that starts the workers of a small run on two hosts."""
    hosts, paths = tmp_path / "hosts", tmp_path / "run.yml"
    hosts.write_text("one slots=1\ntwo slots=1\n")
    paths.write_text(json.dumps({**SMALL, "hostfile": str(hosts), "log_dir": str(tmp_path / "run")}))
    request = read_request(["train.py", str(paths), "--launcher", "pdsh", *flags])
    resolved = resolve_request(request, {})
    return build_command(request, resolved, tmp_path / "run", find_rendezvous(resolved, {}), {}).argv


def test_workers_read_a_file_or_text_where_no_file_system_is_shared(tmp_path: Path) -> None:
    assert started(tmp_path)[-2:] == ("--run-config", str(tmp_path / "run" / "config.json"))
    name, text = started(tmp_path, "--use_shared_fs", "false")[-2:]
    assert name == "--megatron-config"
    assert serialize.decode(text).flat()["num_layers"] == SMALL["num_layers"]
    assert len(text) < 1500


def test_the_revision_of_a_checkout_is_retained(tmp_path: Path) -> None:
    prepare_run_directory(tmp_path, Config.from_flat({}), [])
    launch = json.loads((tmp_path / "launches.jsonl").read_text())
    assert launch["git"] == git_revision(Path(__file__).parent)
    assert launch["packages"].keys() >= {"torch", "deepspeed", "pydantic"}
