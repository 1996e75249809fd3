"""How a checkpoint gets its name, and how others lose theirs: each step leaves something whole, whenever it stops.

global_step<N>.partial            is being written
global_step<N>                    complete
global_step<N>.replaced.partial   complete, for the moment in which another takes its name
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron.checkpoint import files, integrity, layout
from megatron.checkpoint.files import Written

_REPLACED = ".replaced.partial"


def make_room(partial: Path) -> None:
    """An empty folder to write in; what crashed saves left is removed, or gets its name back if it was complete."""
    recover(partial.parent)
    for stale in partial.parent.glob("global_step*.partial"):
        shutil.rmtree(stale)
    partial.mkdir(parents=True)
    (partial / layout.STATE).mkdir()


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
        files.sync_directory(directory)
    aside = final.with_name(final.name + _REPLACED)
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    files.sync_directory(final.parent)
    files.replace_text(final.parent / layout.LATEST, final.name)
    if aside.exists():
        shutil.rmtree(aside)


def retain(save: Path, keep: int | None, *, newest: int, loaded: Path | None) -> None:
    """Removes the checkpoints before `newest` beyond the last `keep`, itself counted.

    loaded: the one that this run started from, which stays. Those after `newest` are another run's and stay too. Each
    loses its name first, so that a crash leaves no half of one.
    """
    if not keep:
        return
    older = [iteration for iteration in layout.iterations(save) if iteration < newest]
    for iteration in older[: max(0, len(older) - (keep - 1))]:
        directory = layout.step_directory(save, iteration)
        if loaded is not None and directory.resolve() == loaded.resolve():
            continue
        doomed = layout.partial_directory(save, iteration)
        directory.rename(doomed)
        shutil.rmtree(doomed)
