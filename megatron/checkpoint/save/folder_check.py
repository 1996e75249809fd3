"""The folder that a run saves to, checked before the first step: it can be written, and it is free or the run's own.

A run that starts at iteration 0 in a folder with checkpoints of another one would replace them one by one, and a later
resume would find parts of both. That is refused, unless `save_overwrite` asks for a new start; then what is there moves
aside first, to <save>/replaced-<time>. While a run is alive no other one saves there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megatron.checkpoint.format import layout
from megatron.checkpoint.remote.s3_client import Bucket
from megatron.checkpoint.remote.s3_sync import copied_iterations
from megatron.checkpoint.save.protocol import together
from megatron.config.schema.checkpoint import CheckpointSection
from megatron.distributed.init import host_name
from megatron.distributed.process_group import all_gather_items
from megatron.errors import ConfigError, ConfigIssue
from megatron.log import get_logger

_log = get_logger(__name__)

LOCK = ".saving"
"""File in the folder that a run holds locked while it lives."""
_NAMED = 6  # iterations in a message


def check_writable(save: str, *, leads: bool, key: str = "save", what: str = "checkpoints") -> None:
    """Makes the folder and writes a file in it, which is removed again. Collective; ConfigError on every rank.

    Args:
        save: the folder.
        leads: whether this rank does so, one rank for each file system.
        key: what named it.
        what: what is to be written.
    """
    errors: list[str] = []
    if leads:
        folder = Path(save)
        probe = folder / f".writable-{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            errors.append(f"{error.strerror or error} on {host_name()}")
    found = all_gather_items(errors)
    if found:
        raise ConfigError.of(
            f"{what} cannot be written there: {found[0]}",
            key=key,
            value=save,
            hint="give a folder that this user can make and write to",
        )


@contextmanager
def sole_writer(save: str | None, *, leads: bool) -> Iterator[None]:
    """Lets no second run save into the folder while this one does. Collective.

    Raises ConfigError on every rank where another run has the lock, or where the folder cannot be written. The lock
    ends with the process that holds it. On a file system without locks two runs at once are the user's to avoid.

    Args:
        save: the folder; None where nothing is saved.
        leads: whether this rank takes the lock, one rank for each file system.
    """
    if save is None:
        yield
        return
    check_writable(save, leads=leads)
    path, name = Path(save) / LOCK, uuid.uuid4().hex
    names = all_gather_items([name] if leads else [])
    file, problems = None, []
    if leads:
        try:
            file = _locked(path, name)
        except OSError as error:  # such as a file that another user's run has left behind
            problems.append(f"its file {LOCK} cannot be locked: {error.strerror or error}")
    all_gather_items([])  # whoever has the lock has written its name
    if leads and file is None and not problems and _holder(path) not in names:
        problems.append("another run is saving there now")  # and not a host of this one that shares the folder
    try:
        for problem in all_gather_items(problems)[:1]:
            hint = f"wait until it has ended, or save to another folder; remove {path} if no run is alive"
            raise ConfigError.of(problem, key="save", value=save, hint=hint)
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()


def _locked(path: Path, name: str) -> IO[str] | None:
    """Opens the file, takes its lock and writes a name into it; None where another process has it.

    Args:
        path: the file.
        name: of the process that asks.
    """
    while True:
        file = path.open("a", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return file
            file.close()
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(name)
                file.flush()
                return file
        file.close()  # its holder has removed it between our opening and our lock


def _holder(path: Path) -> str:
    """Returns the name of the process that has the lock; "" where it has just ended."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def claim(section: CheckpointSection, loaded: Path | None, *, leads: bool) -> None:
    """Makes sure that the run may save into its folder. Collective.

    loaded: the checkpoint that the run goes on from, counters and all; None where iterations count from 0. leads:
    whether this rank may move what is there, one rank for each file system. Raises ConfigError where the folder, or the
    bucket of `s3_path`, holds checkpoints of another run.
    """
    assert section.save is not None, "the caller saves only where `save` is set"
    save = Path(section.save)
    held = sorted(set(all_gather_items(layout.iterations(save))))
    number = layout.iteration_of(loaded) if loaded is not None else None
    if loaded is not None and number is not None and layout.same_folder(loaded.parent, save):
        later = [each for each in held if each > number]
        if later:
            _log.warning(
                "%s also holds %s, from beyond this one: a save of the same iteration replaces it, the others stay",
                save,
                _named(later),
            )
        return
    _refuse_bucket(section, leads=leads)
    if not held:
        return
    if not section.save_overwrite:
        raise ConfigError.of(
            f"the folder holds checkpoints of another run ({_named(held)}), and this one starts "
            + (f"from {loaded}" if loaded is not None else "at iteration 0"),
            key="save",
            value=section.save,
            hint="set load to this folder to go on with them, save to another folder, or set save_overwrite: true "
            "to move them aside",
        )
    aside = save / f"replaced-{time.strftime('%Y%m%d-%H%M%S')}"
    together(lambda: _move(save, aside) if leads else None, f"moving the checkpoints of another run to {aside}")
    _log.warning("%s held %s of another run, which are now in %s", save, _named(held), aside)


def _move(save: Path, aside: Path) -> None:
    """`latest` goes first: whatever interrupts this, no reader takes a checkpoint that is moving for the newest."""
    names = [
        layout.LATEST,
        layout.EVALUATED,
        *(layout.step_directory(save, number).name for number in layout.iterations(save)),
    ]
    aside.mkdir(exist_ok=True)
    for name in names:
        if (save / name).exists():
            (save / name).rename(aside / name)


def _refuse_bucket(section: CheckpointSection, *, leads: bool) -> None:
    if section.s3_path is None:
        return
    bucket = Bucket.open(section.s3_path, section.s3_chunk_size)
    found: list[int] = []
    together(lambda: found.extend(copied_iterations(bucket)) if leads else None, f"looking into {section.s3_path}")
    held = sorted(set(all_gather_items(found)))
    ConfigError.raise_any(
        ConfigIssue(
            f"it holds copies of another run's checkpoints ({_named(held)})",
            key="s3_path",
            value=section.s3_path,
            hint="give another address, or set load to the folder save to go on with them",
        )
        for _ in held[:1]
    )


def _named(iterations: Sequence[int]) -> str:
    shown = ", ".join(map(str, iterations[:_NAMED]))
    return f"iteration{'s' if len(iterations) > 1 else ''} {shown}{', ...' if len(iterations) > _NAMED else ''}"
