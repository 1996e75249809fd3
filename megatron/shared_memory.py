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


def segment(environment: Mapping[str, str], rank: int) -> Path:
    """Returns the segment of a rank, from the MASTER_ADDR and MASTER_PORT of its environment."""
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    return FOLDER / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"


def remove_segment(environment: Mapping[str, str], rank: int) -> None:
    """Removes the segment of a rank, if there is one."""
    with suppress(OSError):
        segment(environment, rank).unlink()
