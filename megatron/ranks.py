"""The rank of this process, as the environment names it, and a port at which ranks of one host can meet.

RANK, LOCAL_RANK and WORLD_SIZE are set by DeepSpeed's launcher and torchrun; for the schedulers and MPIs that have
names of their own, `launcher/rank_env.py` sets them before anything else reads them.
"""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress
from dataclasses import dataclass

NOT_OUTGOING = range(20000, 32768)
"""Ports below those that Linux gives outgoing connections by default."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process."""

    rank: int
    """Among all processes of the run."""
    local_rank: int
    """Among those of this host."""
    world_size: int
    """The number of processes of the run."""

    @staticmethod
    def from_environment() -> Ranks:
        """Reads RANK, LOCAL_RANK and WORLD_SIZE; where they are missing or empty, the process was started alone."""
        return Ranks(
            rank=int(os.environ.get("RANK") or 0),
            local_rank=int(os.environ.get("LOCAL_RANK") or 0),
            world_size=int(os.environ.get("WORLD_SIZE") or 1),
        )


def free_port(port: int = 0) -> int:
    """Returns a TCP port of this host that is free now. Raises OSError when `port` is given and taken.

    Without a port it is one that the kernel gives no outgoing connection, so that it is still free when rank 0 listens.
    """
    if port:
        return _bound(port)
    for candidate in random.SystemRandom().sample(NOT_OUTGOING, 64):
        with suppress(OSError):
            return _bound(candidate)
    return _bound(0)


def _bound(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return int(probe.getsockname()[1])
