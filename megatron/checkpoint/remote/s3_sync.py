"""Copies of checkpoints in an S3 bucket: sent while the training goes on, fetched where a machine has none.

<s3_path>/latest                     the name of the newest complete copy
<s3_path>/global_step<N>/...         the files of a checkpoint; its manifest.json is sent last and removed first

What the disk holds decides; the bucket is where a new machine finds it. A copy that fails is tried again with the
next checkpoint and at the end, and until it is there the folder on the disk stays.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from megatron.atomic import write_atomic
from megatron.checkpoint.format import files, integrity, layout
from megatron.checkpoint.huggingface.encoder_pair import is_folder
from megatron.checkpoint.remote.s3_client import Bucket
from megatron.checkpoint.save.commit import beyond
from megatron.checkpoint.save.protocol import run_with_heartbeat, together
from megatron.config.schema.checkpoint import CheckpointSection
from megatron.errors import ConfigIssue, RunError
from megatron.log import get_logger
from megatron.ranks import Ranks

_log = get_logger(__name__)

_LEAST_PRIORITY = 19


class Mirror:
    """Sends checkpoints, one after another, in a thread of the first rank.

    keep: as many copies stay; None: all. spared: iterations whose copies stay as well.
    """

    def __init__(self, bucket: Bucket, keep: int | None, spared: Sequence[int] = ()) -> None:
        self.bucket = bucket
        self.keep = keep
        self.spared = spared
        self._lock = threading.Lock()
        self._waiting: list[Path] = []
        self._errors: dict[Path, str] = {}
        self._thread: threading.Thread | None = None

    def send(self, directory: Path) -> None:
        """Begins to copy a complete checkpoint, after those that are not there yet; returns at once."""
        with self._lock:
            if directory not in self._waiting:
                self._waiting.append(directory)
        self._begin()

    def pending(self) -> set[Path]:
        """The folders whose copy is not complete, which must stay."""
        with self._lock:
            return set(self._waiting)

    def finish(self) -> None:
        """Returns when everything is sent; what failed is tried once more. RunError naming what is not there."""
        self._join()
        if self.pending():
            self._begin()
            self._join()
        RunError.raise_any(
            ConfigIssue(
                f"it has no copy at {self.bucket.address()}: {self._errors[directory]}",
                location=str(directory),
                hint="the checkpoint itself is whole; copy the folder there when the bucket answers",
            )
            for directory in sorted(self.pending())
        )

    def _begin(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="checkpoint-copy", daemon=True)
                self._thread.start()

    def _join(self) -> None:
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        with suppress(OSError, AttributeError):  # only where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        tried: set[Path] = set()
        while (directory := self._next(tried)) is not None:
            tried.add(directory)
            try:
                send(self.bucket, directory)
                retain(self.bucket, self.keep, newest=layout.iteration_of(directory) or 0, spared=self.spared)
            except (OSError, RunError) as error:
                self._errors[directory] = str(error).splitlines()[0]
                _log.warning("%s could not be copied and stays: %s", directory, self._errors[directory])
                continue
            with self._lock:
                self._waiting.remove(directory)

    def _next(self, tried: set[Path]) -> Path | None:
        with self._lock:
            return next((each for each in self._waiting if each not in tried), None)


def open_mirror(section: CheckpointSection, rank: int) -> Mirror | None:
    """The mirror of a run, on its first rank; None where none is wanted and on other ranks. Collective.

    Raises ConfigError where boto3 is not installed, RunError where the bucket refuses to be written.
    """
    if section.s3_path is None:
        return None
    bucket = Bucket.open(section.s3_path, section.s3_chunk_size)
    together(lambda: bucket.probe() if rank == 0 else None, f"writing to {section.s3_path}")
    return Mirror(bucket, section.keep_last_n_checkpoints, section.extra_save_iters or ()) if rank == 0 else None


def send(bucket: Bucket, directory: Path) -> None:
    """Copies one checkpoint and points the bucket's `latest` at it. OSError or RunError when it cannot."""
    name = directory.name
    listed = files.read_json(directory / layout.MANIFEST)["files"]
    bucket.remove([f"{name}/{layout.MANIFEST}"])
    for path in listed:
        bucket.upload(directory / path, f"{name}/{path}")
    bucket.upload(directory / layout.MANIFEST, f"{name}/{layout.MANIFEST}")
    bucket.write(layout.LATEST, name)


def retain(bucket: Bucket, keep: int | None, *, newest: int, spared: Sequence[int] = ()) -> None:
    """Removes the copies that commit.py's `retain` would remove; later ones are another run's.

    Args:
        bucket: The bucket and prefix of the copies.
        keep: Number of checkpoints to keep; None keeps all.
        newest: Iteration that was just copied.
        spared: Iterations that are never removed.
    """
    if not keep:
        return
    for iteration in beyond(copied_iterations(bucket), keep, newest=newest, spared=spared):
        name = f"global_step{iteration}"
        bucket.remove([f"{name}/{layout.MANIFEST}"])
        bucket.remove(bucket.keys(f"{name}/"))


def fetch_missing(section: CheckpointSection, ranks: Ranks) -> None:
    """Copies the checkpoint to load from the bucket where the folder `load` does not hold it. Collective.

    The first rank does, and then the first rank of every host that does not see what it wrote. Raises ConfigError
    where boto3 is not installed, RunError where the bucket does not answer or holds damaged files.
    """
    if section.s3_path is None:
        return
    bucket = Bucket.open(section.s3_path, section.s3_chunk_size)
    if section.load is None or is_folder(Path(section.load)):
        return
    if section.save is not None and not layout.same_folder(Path(section.save), Path(section.load)):
        return  # the bucket holds what the run saves, which is not what it starts from
    fetch = partial(_fetch, bucket, Path(section.load), section.iteration)
    for turn in (ranks.rank == 0, ranks.rank > 0 and ranks.local_rank == 0):
        run_with_heartbeat(fetch if turn else _nothing, f"fetching from {section.s3_path}")


def _nothing() -> None:
    """What the ranks do whose turn it is not."""


def _fetch(bucket: Bucket, root: Path, iteration: int | None) -> None:
    here = layout.iterations(root)
    if here if iteration is None else iteration in here:
        return
    name = _requested_step(bucket, iteration)
    if name is None:
        _log.info("%s holds no such checkpoint either", bucket.address())
        return
    _log.info("fetching %s", bucket.address(name))
    beside = root / f"{name}.{uuid.uuid4().hex}.partial"
    try:
        bucket.download(f"{name}/{layout.MANIFEST}", beside / layout.MANIFEST)
        for path in _listed(beside, bucket.address(name)):
            bucket.download(f"{name}/{path}", beside / path)
        RunError.raise_any(integrity.damage(beside, contents=True))
        beside.rename(root / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if not here:
        write_atomic(root / layout.LATEST, name, durable=True)


def _listed(directory: Path, location: str) -> list[str]:
    """The files that a manifest names. RunError if it names any outside of the folder."""
    try:
        names = [str(name) for name in files.read_json(directory / layout.MANIFEST)["files"]]
    except (KeyError, TypeError) as error:
        raise RunError.of("its manifest.json is no list of a checkpoint's files", location=location) from error
    RunError.raise_any(
        ConfigIssue(f"its manifest.json names {json.dumps(name)}, which is outside", location=location)
        for name in names
        if Path(name).is_absolute() or ".." in Path(name).parts
    )
    return names


def _requested_step(bucket: Bucket, iteration: int | None) -> str | None:
    """The name of the copy to fetch: that of the iteration, else what `latest` says, else the newest complete one."""
    complete = copied_iterations(bucket)
    if iteration is not None:
        return f"global_step{iteration}" if iteration in complete else None
    named = (bucket.read(layout.LATEST) or "").strip()
    if layout.iteration_of(Path(named)) in complete:
        return named
    return f"global_step{complete[-1]}" if complete else None


def copied_iterations(bucket: Bucket) -> list[int]:
    """Iterations that have a complete copy, in rising order."""
    found = {layout.iteration_of(Path(name)) for name in bucket.folders()} - {None}
    return sorted(
        number for number in found if number is not None and bucket.keys(f"global_step{number}/{layout.MANIFEST}")
    )
