"""Work on files that rank 0 does for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron.distributed.process_group import any_rank
from megatron.errors import ConfigError, RunError
from megatron.ranks import Ranks


def on_main_rank(action: Callable[[], None], *, folder: Path, key: str) -> None:
    """Calls an action on rank 0. Every rank raises where it cannot, so that none waits for a file. Collective.

    Args:
        action: raises ConfigError, RunError or OSError.
        folder: that it works on.
        key: of the configuration that names the folder.
    """
    error: ConfigError | RunError | OSError | None = None
    if Ranks.from_environment().rank == 0:
        try:
            action()
        except (ConfigError, RunError, OSError) as raised:
            error = raised
    failed = any_rank(error is not None)
    if isinstance(error, OSError):
        raise RunError.of(f"it cannot be written: {error.strerror}", key=key, location=str(folder)) from None
    if error is not None:
        raise error
    if failed:
        raise RunError.of("rank 0 cannot use the folder", key=key, location=str(folder))
