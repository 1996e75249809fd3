"""DeepSpeed's shared-memory segments of a run on CPUs, and their removal.

Its compiled collectives create one segment per rank, 66 MiB in /dev/shm, and never remove it: the memory of the host
stays in use after the last process has ended. An unlinked segment stays usable for the processes that have it open, so
each rank unlinks its own once all ranks have opened it, and the process that started a rank removes what a kill before
that moment left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

FOLDER = Path("/dev/shm")
SEGMENT_BYTES = (66 << 20) + 4096
"""Two buffers of 1 MiB, two of 32 MiB, and what ranks say of them (csrc/cpu/comm/shm.cpp of DeepSpeed 0.19)."""


def segment(environment: Mapping[str, str], rank: int) -> Path:
    """Returns the segment of a rank, from the MASTER_ADDR and MASTER_PORT of its environment."""
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    return FOLDER / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"


def reserve_segment(environment: Mapping[str, str], rank: int) -> bool:
    """Makes the segment of a rank, with its memory. Returns false, and leaves none, where that does not fit."""
    path = segment(environment, rank)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError:
        return False
    try:
        os.posix_fallocate(descriptor, 0, SEGMENT_BYTES)
    except OSError:
        remove_segment(environment, rank)
        return False
    finally:
        os.close(descriptor)
    return True


def free_memory() -> str:
    """Returns how much memory the folder of segments has left, in words."""
    try:
        found = os.statvfs(FOLDER)
    except OSError:
        return f"{FOLDER} is not there"
    free, size = (blocks * found.f_frsize >> 20 for blocks in (found.f_bavail, found.f_blocks))
    return f"{FOLDER} has {free:,} MiB left of {size:,}"


def remove_segment(environment: Mapping[str, str], rank: int) -> None:
    """Removes the segment of a rank, if there is one."""
    with suppress(OSError):
        segment(environment, rank).unlink()
