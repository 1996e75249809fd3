"""Tests whether ranks on other hosts see the files that rank 0 writes."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from megatron.distributed.process_group import barrier
from megatron.errors import RunError

INTERVAL = 0.05
"""Time between two checks of the folder [s]."""


def sees_files_of_rank_0(folder: Path, *, patience: float = 0.0) -> bool:
    """Returns true if this rank finds in `folder` a file that rank 0 has just written. Collective over all ranks.

    Rank 0 creates a missing folder, and removes the file at the end. Raises RunError on every rank if rank 0 cannot
    write.

    Args:
        folder: path of the folder on this rank.
        patience: time to wait for the file, since a network file system may show a new file late [s].
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    name, problem = f".seen-{uuid.uuid4().hex}", None
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError as error:
            problem = str(error)
    found = [name, problem]
    dist.broadcast_object_list(found, src=0)
    name, problem = str(found[0]), found[1]
    if problem is not None:
        hint = "give a folder that this user can make and write to"
        raise RunError.of(f"rank 0 cannot write there: {problem}", location=str(folder), hint=hint)
    seen = _appears(folder, name, patience)
    barrier()
    if dist.get_rank() == 0:
        (folder / name).unlink(missing_ok=True)
    return seen


def _appears(folder: Path, name: str, patience: float) -> bool:
    """Returns whether the name appears in the listing of the folder, which is read anew each time."""
    deadline = time.monotonic() + patience
    while True:
        try:
            if name in os.listdir(folder):
                return True
        except OSError:
            pass  # no such folder here yet
        if time.monotonic() >= deadline:
            return False
        time.sleep(INTERVAL)
