"""What the machine offers, as the launcher found it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Resources:
    """world_size: ranks of the run. hosts: (name, ranks on it) for each host; empty where only the number is known."""

    world_size: int
    accelerator: Literal["cuda", "cpu"] = "cpu"
    hosts: tuple[tuple[str, int], ...] = ()
