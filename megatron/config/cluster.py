"""Resources of the cluster, as the launcher found them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Resources:
    """Hosts and ranks of a run."""

    world_size: int
    """Ranks of the run."""
    accelerator: Literal["cuda", "cpu"] = "cpu"
    """Device of each rank."""
    hosts: tuple[tuple[str, int], ...] = ()
    """Name and ranks of each host; empty where only the number of ranks is known."""
