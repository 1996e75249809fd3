"""Metrics as TensorBoard scalars in exactly `tensorboard_dir`; needs the optional package `tensorboard`.

The registry loads this file on first use, and names the extra to install where the package is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from torch.utils.tensorboard import SummaryWriter

from megatron.errors import ConfigError
from megatron.metrics.sinks.base import Observe, Start


class TensorBoard:
    """Writes each metric as a scalar of the same name.

    Events of an earlier run at iterations that this run does again are hidden by TensorBoard itself (`purge_step`).
    """

    def __init__(self, directory: str, start_iteration: int = 0) -> None:
        self._writer = SummaryWriter(
            log_dir=directory, purge_step=start_iteration + 1 if start_iteration else None, flush_secs=30
        )

    @classmethod
    def open(cls, observe: Observe, start: Start) -> Self:
        """Opens the sink at `tensorboard_dir`, which must be set."""
        if observe.tensorboard_dir is None:
            raise ConfigError.of(
                "TensorBoard needs a directory", key="tensorboard_dir", value=None, hint="name a directory"
            )
        try:
            return cls(observe.tensorboard_dir, start.iteration)
        except OSError as error:
            raise ConfigError.of(
                f"event files cannot be written there: {error.strerror or error}",
                key="tensorboard_dir",
                value=observe.tensorboard_dir,
                hint="give a folder that this user can make and write to",
            ) from error

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._writer.close()
