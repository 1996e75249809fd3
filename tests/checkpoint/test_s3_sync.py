"""Copies in a bucket, against a real S3 server on this machine: sent, kept, fetched, and refused in words."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from megatron.checkpoint.format import layout
from megatron.checkpoint.load import find
from megatron.checkpoint.load.loader import make_available
from megatron.checkpoint.remote import s3_sync
from megatron.checkpoint.remote.s3_client import Bucket
from megatron.checkpoint.remote.s3_sync import Mirror, fetch_missing, open_mirror
from megatron.checkpoint.save.commit import retain
from megatron.config.schema.checkpoint import CheckpointSection
from megatron.distributed.mesh import Topology
from megatron.engine.vocabulary import build_vocabulary
from megatron.errors import ConfigError, RunError
from megatron.ranks import Ranks
from megatron.tokenizers.builder import build_tokenizer
from tests.checkpoint.saved import save
from tests.config.small import resolved
from tests.end_to_end.runs import run, series

PART = 5 << 20
ADDRESS = "s3://models/some/run"
ALONE = Ranks(0, 0, 1)


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadedMotoServer]:
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def environment(server: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What a user's environment says of the server, whose bucket `models` is empty."""
    host, port = server.get_host_and_port()
    reported = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "who",
        "AWS_SECRET_ACCESS_KEY": "what",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in reported.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="models")
    yield reported
    bucket = boto3.resource("s3").Bucket("models")
    bucket.objects.all().delete()
    bucket.delete()


def section(folder: Path, **changes: Any) -> CheckpointSection:
    reported = {"save": str(folder), "load": str(folder), "s3_path": ADDRESS, "s3_chunk_size": PART}
    return CheckpointSection(**{**reported, **changes})


def copies() -> list[str]:
    """The names of the complete copies, as another program sees them."""
    listed = boto3.client("s3").list_objects_v2(Bucket="models", Prefix="some/run/").get("Contents", [])
    return sorted(Path(entry["Key"]).parent.name for entry in listed if entry["Key"].endswith(layout.MANIFEST))


@pytest.mark.usefixtures("environment")
def test_a_new_machine_finds_what_was_copied(tmp_path: Path) -> None:
    saved = [save(tmp_path / "old", iteration) for iteration in (1, 2)]
    sender = open_mirror(section(tmp_path / "old"), rank=0)
    assert sender is not None
    for directory in saved:
        sender.send(directory)
    sender.finish()
    assert copies() == ["global_step1", "global_step2"]
    make_available(section(tmp_path / "new"), shared=True)
    assert find.find_intact(tmp_path / "new", None, "error") == tmp_path / "new" / "global_step2"
    for path in (path for path in saved[1].rglob("*") if path.is_file()):
        assert (tmp_path / "new" / path.relative_to(tmp_path / "old")).read_bytes() == path.read_bytes()
    fetch_missing(section(tmp_path / "new", iteration=1), ALONE)
    assert layout.iterations(tmp_path / "new") == [1, 2]
    assert (tmp_path / "new" / layout.LATEST).read_text() == "global_step2"


@pytest.mark.usefixtures("environment")
def test_sizing_the_vocabulary_fetches_nothing(tmp_path: Path) -> None:
    sender = Mirror(Bucket.open(ADDRESS, PART), None)
    sender.send(save(tmp_path / "old", 4))
    sender.finish()
    folder = str(tmp_path / "new")
    config = resolved(save=folder, load=folder, s3_path=ADDRESS, checkpoint_factor=1).config
    build_vocabulary(config, Topology.single(), build_tokenizer(config.tokenizer))
    assert not Path(folder).exists()
    make_available(config.checkpoint, shared=True)
    assert layout.iterations(Path(folder)) == [4]


@pytest.mark.usefixtures("environment")
def test_what_the_disk_holds_decides(tmp_path: Path) -> None:
    sender = Mirror(Bucket.open(ADDRESS, PART), None)
    sender.send(save(tmp_path / "old", 9))
    sender.finish()
    save(tmp_path / "new", 3)
    fetch_missing(section(tmp_path / "new"), ALONE)
    fetch_missing(section(tmp_path / "other", save=str(tmp_path / "elsewhere")), ALONE)
    assert layout.iterations(tmp_path / "new") == [3]
    assert layout.iterations(tmp_path / "other") == [], "the bucket holds what is saved, not what is started from"


@pytest.mark.usefixtures("environment")
def test_old_copies_go_and_those_of_later_iterations_stay(tmp_path: Path) -> None:
    sender = Mirror(Bucket.open(ADDRESS, PART), 2)
    for iteration in (9, 1, 2, 3):
        sender.send(save(tmp_path, iteration))
    sender.finish()
    assert copies() == ["global_step2", "global_step3", "global_step9"]
    left = boto3.client("s3").list_objects_v2(Bucket="models", Prefix="some/run/global_step1")
    assert left["KeyCount"] == 0
    assert Bucket.open(ADDRESS, PART).read(layout.LATEST) == "global_step3"


@pytest.mark.usefixtures("environment")
def test_a_failed_copy_costs_nothing_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is gone for a while: the folder stays although retention would take it, until the copy is there."""
    bucket = Bucket.open(ADDRESS, PART)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        sender = Mirror(Bucket.open(ADDRESS, PART), 2)
    first = save(tmp_path, 1)
    sender.send(first)
    with pytest.raises(
        RunError, match=r"global_step1: it has no copy at s3://models/some/run/: .*the checkpoint itself"
    ):
        sender.finish()
    retain(tmp_path, 1, newest=save_one(tmp_path, 2), loaded=None, pending=sender.pending())
    assert layout.iterations(tmp_path) == [1, 2]
    sender.bucket = bucket
    sender.send(tmp_path / "global_step2")
    sender.finish()
    assert copies() == ["global_step1", "global_step2"]
    retain(tmp_path, 1, newest=2, loaded=None, pending=sender.pending())
    assert layout.iterations(tmp_path) == [2]


def save_one(folder: Path, iteration: int) -> int:
    save(folder, iteration)
    return iteration


@pytest.mark.usefixtures("environment")
def test_a_copy_that_was_cut_off_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever upload is the last one that happens, a reader gets the whole copy before it."""
    bucket = Bucket.open(ADDRESS, PART)
    s3_sync.send(bucket, save(tmp_path / "old", 1))
    second = save(tmp_path / "old", 2)
    count = sum(path.is_file() for path in second.rglob("*"))
    upload = Bucket.upload
    for last in range(count):
        done = []

        def some(self: Bucket, path: Path, key: str, last: int = last, done: list[str] = done) -> None:
            if len(done) == last:
                raise RunError("the process is killed here")
            done.append(key)
            upload(self, path, key)

        monkeypatch.setattr(Bucket, "upload", some)
        with pytest.raises(RunError, match="killed"):
            s3_sync.send(bucket, second)
        new = tmp_path / f"new{last}"
        fetch_missing(section(new), ALONE)
        assert layout.iterations(new) == [1]
        assert find.find_intact(new, None, "error") == new / "global_step1"


@pytest.mark.usefixtures("environment")
def test_a_damaged_copy_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    bucket = Bucket.open(ADDRESS, PART)
    s3_sync.send(bucket, save(tmp_path / "old", 1))
    bucket.write(f"global_step1/{layout.RUN}", "{}")
    with pytest.raises(RunError, match=r"run\.json: 2 bytes where"):
        fetch_missing(section(tmp_path / "new"), ALONE)
    assert list((tmp_path / "new").iterdir()) == []
    bucket.write(f"global_step1/{layout.MANIFEST}", json.dumps({"version": 1, "files": {"../../trap": {}}}))
    with pytest.raises(RunError, match=r"trap.*is outside"):
        fetch_missing(section(tmp_path / "new"), ALONE)


@pytest.mark.usefixtures("environment")
def test_large_files_travel_in_parts(tmp_path: Path) -> None:
    content = os.urandom(2 * PART + 1)
    (tmp_path / "large").write_bytes(content)
    bucket = Bucket.open(ADDRESS, PART)
    bucket.upload(tmp_path / "large", "large")
    assert boto3.client("s3").head_object(Bucket="models", Key="some/run/large")["ETag"].endswith('-3"')
    bucket.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


@pytest.mark.usefixtures("environment")
def test_a_bucket_that_refuses_is_reported_before_training(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"s3://nobodys/run/\.write-test: writing failed: .*NoSuchBucket.*credentials"):
        open_mirror(section(tmp_path, s3_path="s3://nobodys/run"), rank=0)
    open_mirror(section(tmp_path), rank=0)
    assert boto3.client("s3").list_objects_v2(Bucket="models")["KeyCount"] == 0, "the trial leaves nothing"


def test_without_boto3_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"s3_path = 's3://models/some/run': .*boto3.*pip install neox\[s3\]"):
        open_mirror(section(tmp_path), rank=0)
    for load in (str(tmp_path), None):
        with pytest.raises(ConfigError, match="boto3"):
            fetch_missing(section(tmp_path, load=load), ALONE)
    assert open_mirror(section(tmp_path, s3_path=None), rank=0) is None


STEPS: dict[str, Any] = {"train_iters": 10, "zero_optimization": {"stage": 1}}


@pytest.fixture(scope="module")
def full(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The records of two ranks that were not disturbed."""
    return run(2, tmp_path_factory.mktemp("whole"), data_path=dataset, **STEPS)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("background", [False, True])
def test_a_run_goes_on_where_its_machine_was_lost(
    background: bool, dataset: str, full: list[dict[str, float]], tmp_path: Path
) -> None:
    """Two ranks stop at 5; every file of the machine is gone; another one goes on, bit by bit."""
    settings = {"data_path": dataset, **STEPS}
    settings |= {"checkpoint_factor": 3, "keep_last_n_checkpoints": 1, "checkpoint_async": background}
    first, second = tmp_path / "first", tmp_path / "second"
    run(2, tmp_path, **settings, s3_path=ADDRESS, save=str(first), load=str(first), exit_interval=5)
    assert layout.iterations(first) == [5]
    shutil.rmtree(first)
    resumed = run(2, tmp_path, **settings, s3_path=ADDRESS, save=str(second), load=str(second))
    assert layout.iterations(second) == [5, 10], "what was loaded stays"
    for name in ("train/lm_loss", "train/grad_norm", "validation/lm_loss"):
        assert series(resumed, name) == series(full, name), name
    assert copies() == ["global_step10"]
