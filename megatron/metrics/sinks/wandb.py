"""Metrics as a Weights & Biases run; needs the optional package `wandb`.

The run's id is kept beside the metrics, so that a restart goes on with the same run. Without network access
WANDB_MODE=offline keeps everything in the run directory, for `wandb sync`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import wandb

from megatron.errors import ConfigError
from megatron.metrics.sinks.base import Observe, Start
from megatron.metrics.wandb_key import wandb_key

ID_FILE = "wandb_run_id"
UNASKED_SECONDS = 20.0
"""How long a run waits for the service where nobody asked for it by `use_wandb: true` [s]."""
WITHOUT_KEY = frozenset({"offline", "disabled", "dryrun"})


class WeightsAndBiases:
    """Logs each record at its iteration, under the record's own names."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def open(cls, observe: Observe, start: Start) -> Self:
        """Starts or continues a run. ConfigError without a key, or where the service refuses."""
        mode = os.environ.get("WANDB_MODE", "online")
        if mode not in WITHOUT_KEY and wandb_key(observe.wandb_host) is None:
            raise ConfigError.of(
                f"there is no key for {observe.wandb_host}",
                key="use_wandb",
                value=observe.use_wandb,
                hint="run `wandb login`, set WANDB_API_KEY, or keep the run here with WANDB_MODE=offline",
            )
        directory = Path(observe.log_dir or ".")
        name = observe.wandb_run_name
        try:
            run = wandb.init(
                project=observe.wandb_project,
                entity=observe.wandb_team,
                group=observe.wandb_group,
                name=f"{name}-rank{start.rank}" if name and start.rank else name,
                dir=str(directory),
                id=_run_id(directory, start),
                resume="allow",
                config={key: value for key, value in start.settings.items() if value is not None},
                settings=wandb.Settings(base_url=observe.wandb_host, console="off", silent=True, **_patience(observe)),
            )
        except (wandb.errors.CommError, wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise ConfigError.of(
                f"Weights & Biases refuses the run: {error}",
                key="use_wandb",
                value=observe.use_wandb,
                hint="correct the wandb_* keys, or set WANDB_MODE=offline",
            ) from error
        return cls(run)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=iteration)

    def close(self) -> None:
        self._run.finish()


def _patience(observe: Observe) -> dict[str, float]:
    return {} if observe.use_wandb else {"init_timeout": UNASKED_SECONDS, "login_timeout": UNASKED_SECONDS}


def _run_id(directory: Path, start: Start) -> str:
    """The id of this rank's run: that of the run that is continued, else a new one."""
    path = directory / (ID_FILE if start.rank == 0 else f"{ID_FILE}_{start.rank}")
    if start.iteration > 0 and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    made = secrets.token_hex(4)
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(made + "\n", encoding="utf-8")
    return made
