"""Every registered sink: it opens, stores records, goes on after a restart, and says what it needs."""

from __future__ import annotations

import json
import logging
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megatron.config.schema.observe import ObserveSection
from megatron.errors import ConfigError, RunError
from megatron.metrics.builder import build_reporter, select_sinks, wants_wandb
from megatron.metrics.sinks.base import Start
from megatron.metrics.sinks.jsonl import read_metrics
from megatron.metrics.wandb_key import wandb_key
from megatron.registry import SINKS

KEYS = ("WANDB_API_KEY", "WANDB_LOCAL", "WANDB_MODE", "COMET_API_KEY", "COMET_START_ONLINE", "NETRC")
RECORDS = {1: {"train/lm_loss": 4.5}, 2: {"train/lm_loss": 4.25, "runtime/tokens_per_sec": 100.0}}
SETTINGS = {"num_layers": 2, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}, "lr_decay_iters": None}


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def observed(folder: Path) -> ObserveSection:
    return ObserveSection(
        log_dir=str(folder),
        tensorboard_dir=str(folder / "board"),
        use_wandb=True,
        wandb_group="group",
        wandb_run_name="name",
        wandb_team="team",
        use_comet=True,
        comet_workspace="space",
        comet_project="project",
        comet_experiment_name="experiment",
        comet_tags=("one", "two"),
        comet_others={"cluster": "here"},
    )


def stored_by_jsonl(folder: Path) -> set[str]:
    return {name for record in read_metrics(folder) for name in record}


def stored_by_tensorboard(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "board"))
    found.Reload()
    return set(found.Tags()["scalars"])


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    data, at, full = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):  # still being written
            return
        full += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the end of one
            yield full
            full = b""


def wandb_exit_codes(path: Path, seconds: float = 60) -> list[int]:
    """The exit codes of a .wandb file, which W&B's own process may write after `finish` has returned."""
    from wandb.proto import wandb_internal_pb2

    end = time.monotonic() + seconds
    while True:
        records = [wandb_internal_pb2.Record.FromString(data) for data in wandb_records(path)]
        codes = [record.exit.exit_code for record in records if record.HasField("exit")]
        if codes or time.monotonic() > end:
            return codes
        time.sleep(0.05)


def stored_by_wandb(folder: Path) -> set[str]:
    from wandb.proto import wandb_internal_pb2

    names: set[str] = set()
    runs = 0
    for path in folder.glob("wandb/offline-run-*/run-*.wandb"):
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            names |= {item.key or "/".join(item.nested_key) for item in record.history.item}
            if record.HasField("run"):
                run = record.run
                assert (run.project, run.run_group, run.display_name, run.entity) == ("neox", "group", "name", "team")
                config = {update.key: json.loads(update.value_json) for update in run.config.update}
                assert config["num_layers"] == 2
                runs += 1
    assert runs >= 1
    return names


def stored_by_comet(folder: Path) -> set[str]:
    names: set[str] = set()
    text = ""
    for path in folder.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            lines = archive.read("messages.json").decode().splitlines()
        text += "\n".join(lines)
        for line in lines:
            metric = json.loads(line).get("payload", {}).get("metric") or {}
            names |= {metric["metricName"]} if "metricName" in metric else set()
    for reported in ("experiment", "cluster", "two"):
        assert reported in text
    return names


STORED: dict[str, Callable[[Path], set[str]]] = {
    "jsonl": stored_by_jsonl,
    "tensorboard": stored_by_tensorboard,
    "wandb": stored_by_wandb,
    "comet": stored_by_comet,
}


@pytest.mark.parametrize("name", SINKS.names)
def test_records_are_stored_and_a_restart_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("COMET_START_ONLINE", "0")
    monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")
    for start in (0, 1):
        sink = SINKS.load(name).open(observed(tmp_path), Start(start, settings=SETTINGS))
        for iteration, metrics in RECORDS.items():
            if iteration > start:
                sink.write(iteration, metrics)
        sink.close()
    assert STORED[name](tmp_path) >= {"train/lm_loss", "runtime/tokens_per_sec"}


def test_a_failed_run_is_one_for_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name, failure in (("good", None), ("failed", RunError.of("the loss is not a number"))):
        sink = SINKS.load("wandb").open(observed(tmp_path / name), Start(0, settings=SETTINGS))
        with suppress(RunError):
            try:
                if failure is not None:
                    raise failure
            finally:
                sink.close()
        (file,) = (tmp_path / name).glob("wandb/offline-run-*/run-*.wandb")
        assert wandb_exit_codes(file) == [0 if failure is None else 1]


def test_every_sink_is_read_back() -> None:
    assert set(STORED) == set(SINKS.names)


@pytest.mark.parametrize(("name", "key"), [("wandb", "WANDB_API_KEY"), ("comet", "COMET_API_KEY")])
def test_a_service_without_a_key_says_how_to_get_on(name: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"there is no key.*{key}.*(offline|COMET_START_ONLINE)"):
        SINKS.load(name).open(observed(tmp_path), Start())


def test_wandb_is_on_by_itself_only_where_there_is_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    silent = ObserveSection()
    assert not wants_wandb(silent)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wants_wandb(silent)
    assert not wants_wandb(ObserveSection(use_wandb=False))
    assert select_sinks(silent) == ["wandb"]
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_key("https://api.wandb.ai") == "secret"
    assert wandb_key("https://wandb.example.org") is None


def test_other_ranks_log_only_where_all_are_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(type(SINKS), "load", lambda self, name: Recorded(name, opened))
    build_reporter(ObserveSection(use_wandb=True), 3)
    assert opened == []
    build_reporter(ObserveSection(use_wandb=True, wandb_init_all_ranks=True), 3)
    assert opened == [("wandb", 3)]


class Recorded:
    """Stands for a sink's class."""

    def __init__(self, name: str, opened: list[Any]) -> None:
        self.name, self.opened = name, opened

    def open(self, observe: Any, start: Start) -> None:
        self.opened.append((self.name, start.rank))


def test_a_folder_that_cannot_be_made_is_the_users_issue(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"tensorboard_dir.*cannot be written there"):
        build_reporter(ObserveSection(tensorboard_dir=str(tmp_path / "file" / "events")), 0)


def test_only_a_request_for_it_lets_wandb_stop_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A key in the environment and a service that does not answer."""
    import wandb

    waited: list[float | None] = []

    def unreachable(**keys: Any) -> None:
        waited.append(keys["settings"].init_timeout)
        raise wandb.errors.CommError("no network")

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(wandb, "init", unreachable)
    build_reporter(ObserveSection(log_dir=str(tmp_path)), 0).close()
    assert "not logged to Weights & Biases" in caplog.text
    assert "no network" in caplog.text
    with pytest.raises(ConfigError, match="no network"):
        build_reporter(ObserveSection(log_dir=str(tmp_path), use_wandb=True), 0)
    assert waited == [20.0, wandb.Settings().init_timeout]


class Run:
    """A W&B run that was continued: steps before `starting_step` are dropped."""

    def __init__(self, name: str, starting_step: int) -> None:
        self.id, self.starting_step = name, starting_step
        self.finished = False

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize(("iteration", "runs"), [(10, 1), (9, 2), (5, 2), (0, 1)])
def test_a_training_that_goes_back_starts_a_wandb_run_of_its_own(
    iteration: int, runs: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The stored run has logged up to iteration 10."""
    import wandb

    (tmp_path / "wandb_run_id").write_text("stored\n")
    opened: list[Run] = []

    def init(**keys: Any) -> Run:
        opened.append(Run(keys["id"], 11 if keys["id"] == "stored" else 0))
        return opened[-1]

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", init)
    with caplog.at_level(logging.INFO):
        SINKS.load("wandb").open(observed(tmp_path), Start(iteration))
    assert len(opened) == runs
    assert [run.finished for run in opened] == [True] * (runs - 1) + [False]
    assert (opened[-1].id == "stored") == (iteration == 10)
    assert (tmp_path / "wandb_run_id").read_text().strip() == opened[-1].id
    assert ("has steps up to 10, which it does not replace" in caplog.text) == (runs == 2)


@pytest.mark.parametrize(("iteration", "runs"), [(0, 2), (1, 2), (2, 1), (3, 1)])
def test_a_training_that_goes_back_starts_a_wandb_run_of_its_own_offline_too(
    iteration: int, runs: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first start logs steps 1 and 2; nothing but the run directory knows of them."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    with caplog.at_level(logging.INFO):
        for start in (0, iteration):
            sink = SINKS.load("wandb").open(observed(tmp_path), Start(start, settings=SETTINGS))
            for step in (1, 2) if start == 0 else (iteration + 1, iteration + 2):
                sink.write(step, {"train/lm_loss": 1.0})
            sink.close()
    names = {path.name.split("-")[3] for path in tmp_path.glob("wandb/offline-run-*")}
    assert len(names) == runs
    assert ("has steps up to 2, which it does not replace: a new run starts at 2" in caplog.text) == (iteration == 1)
