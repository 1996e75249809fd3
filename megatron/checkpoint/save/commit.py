"""How a checkpoint gets its name, and how others lose theirs: each step leaves something whole, whenever it stops.

global_step<N>.partial            is being written
global_step<N>                    complete
global_step<N>.replaced.partial   complete, for the moment in which another takes its name
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Container, Iterable
from pathlib import Path

from megatron.atomic import sync_directory, write_atomic
from megatron.checkpoint.format import integrity, layout
from megatron.checkpoint.format.files import Written
from megatron.checkpoint.save.protocol import together
from megatron.distributed.shared_folder import sees_files_of_rank_0
from megatron.errors import RunError

_REPLACED = ".replaced.partial"
_PATIENCE = 10.0  # seconds until a network file system shows a new file everywhere


def make_room(partial: Path) -> None:
    """An empty folder to write in; what crashed saves left is removed, or gets its name back if it was complete."""
    recover(partial.parent)
    for stale in partial.parent.glob("global_step*.partial"):
        shutil.rmtree(stale)
    partial.mkdir(parents=True)
    (partial / layout.STATE).mkdir()


def require_shared(save: Path, rank: int) -> None:
    """RunError unless every rank sees what the first one writes to the folder; collective.

    A checkpoint whose parts are on the disks of several nodes would be found incomplete only when it is needed.
    """
    seen = sees_files_of_rank_0(save, patience=_PATIENCE)

    def check() -> None:
        if not seen:
            raise RunError.of(
                f"rank {rank} on {socket.gethostname()} does not see what rank 0 writes there",
                location=str(save),
                hint="save to a folder on a file system that all nodes share, or set use_shared_fs: false",
            )

    together(check, f"looking into {save}")


def recover(save: Path) -> None:
    """Gives a checkpoint its name back that a crash left between two names."""
    for aside in save.glob(f"global_step*{_REPLACED}"):
        final = aside.with_name(aside.name.removesuffix(_REPLACED))
        if not final.exists() and integrity.is_ours(aside):
            aside.rename(final)


def publish(partial: Path, final: Path, written: Iterable[Written]) -> None:
    """Complete on the disk first, named second, `latest` third."""
    integrity.write_manifest(partial, written)
    for directory in (*(entry for entry in partial.iterdir() if entry.is_dir()), partial):
        sync_directory(directory)
    aside = final.with_name(final.name + _REPLACED)
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    sync_directory(final.parent)
    write_atomic(final.parent / layout.LATEST, final.name, durable=True)
    if aside.exists():
        shutil.rmtree(aside)


def retain(
    save: Path,
    keep: int | None,
    *,
    newest: int,
    loaded: Path | None,
    pending: Container[Path] = (),
    spared: Container[int] = (),
) -> None:
    """Removes the checkpoints before `newest` beyond the last `keep`, itself counted.

    Args:
        save: The save folder.
        keep: How many checkpoints to keep; all if None.
        newest: The iteration that is always kept.
        loaded: The one that this run started from, which stays.
        pending: Those that are still being copied elsewhere, which stay for now.
        spared: Iterations that were asked for by number; they stay and do not count. Those after `newest` are another
            run's and stay too. Each loses its name first, so that a crash leaves no half of one.
    """
    if not keep:
        return
    for iteration in beyond(layout.iterations(save), keep, newest=newest, spared=spared):
        directory = layout.step_directory(save, iteration)
        if directory in pending or (loaded is not None and directory.resolve() == loaded.resolve()):
            continue
        doomed = layout.partial_directory(save, iteration)
        directory.rename(doomed)
        shutil.rmtree(doomed)


def beyond(iterations: Iterable[int], keep: int, *, newest: int, spared: Container[int]) -> list[int]:
    """The iterations, given in rising order, that come before the last `keep` up to `newest` and are not spared.

    Args:
        iterations: Iterations of the checkpoints, ascending.
        keep: Number of checkpoints to keep.
        newest: Iteration that was just saved.
        spared: Iterations that are never removed.
    """
    counted = [each for each in iterations if each < newest and each not in spared]
    return counted[: max(0, len(counted) - (keep - 1))]
