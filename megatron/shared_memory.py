"""DeepSpeed's shared-memory segments of a run on CPUs, and their removal.

Its compiled collectives make one segment a rank, 66 MiB in /dev/shm, when the ranks meet, and never remove it: the
memory of the host stays taken after the last process has gone. A segment whose name is gone lives on for those that
have it open and goes with the last of them, so each rank removes the name of its own once all ranks have opened it, and
whoever started a rank removes what a kill before that moment left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

FOLDER = Path("/dev/shm")


def segment(environment: Mapping[str, str], rank: int) -> Path:
    """The segment of a rank. environment: the rank's own, which says where the ranks met."""
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    return FOLDER / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"


def remove_segment(environment: Mapping[str, str], rank: int) -> None:
    """Removes the segment of a rank where there is one."""
    with suppress(OSError):
        segment(environment, rank).unlink()
