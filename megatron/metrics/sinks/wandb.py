"""Metrics as a Weights & Biases run; needs the optional package `wandb`.

The run's id is stored beside the metrics, so that a restart continues the same run. W&B never replaces a step, so a
resume before the run's last step starts a new run. Without network access WANDB_MODE=offline writes everything to the
run directory, for `wandb sync`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import wandb

from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.metrics.sinks.base import Observe, Start
from megatron.metrics.wandb_key import wandb_key

ID_FILE = "wandb_run_id"
DEFAULT_TIMEOUT = 20.0
"""Timeout of the service without `use_wandb: true` [s]."""
WITHOUT_KEY = frozenset({"offline", "disabled", "dryrun"})


class WeightsAndBiases:
    """Logs each record at its iteration, under the record's own names."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def open(cls, observe: Observe, start: Start) -> Self:
        """Starts or continues a run. Raises ConfigError without a key, or where the service refuses."""
        mode = os.environ.get("WANDB_MODE", "online")
        if mode not in WITHOUT_KEY and wandb_key(observe.wandb_host) is None:
            raise ConfigError.of(
                f"there is no key for {observe.wandb_host}",
                key="use_wandb",
                value=observe.use_wandb,
                hint="run `wandb login`, set WANDB_API_KEY, or keep the run here with WANDB_MODE=offline",
            )
        path = Path(observe.log_dir or ".") / (ID_FILE if start.rank == 0 else f"{ID_FILE}_{start.rank}")
        continued = start.iteration > 0 and path.is_file()
        run = _init_run(observe, start, path.read_text(encoding="utf-8").strip() if continued else _new_id(path))
        if run.starting_step > start.iteration + 1:  # earlier steps would be silently dropped
            get_logger(__name__).info(
                "the Weights & Biases run %s has steps up to %d, which it does not replace: a new run starts at %d",
                run.id,
                run.starting_step - 1,
                start.iteration + 1,
            )
            run.finish()
            run = _init_run(observe, start, _new_id(path))
        return cls(run)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=iteration)

    def close(self) -> None:
        self._run.finish()


def _timeouts(observe: Observe) -> dict[str, float]:
    return {} if observe.use_wandb else {"init_timeout": DEFAULT_TIMEOUT, "login_timeout": DEFAULT_TIMEOUT}


def _init_run(observe: Observe, start: Start, run_id: str) -> Any:
    """Starts the W&B run of this id, or continues it. Raises ConfigError where the service refuses."""
    name = observe.wandb_run_name
    try:
        return wandb.init(
            project=observe.wandb_project,
            entity=observe.wandb_team,
            group=observe.wandb_group,
            name=f"{name}-rank{start.rank}" if name and start.rank else name,
            dir=observe.log_dir or ".",
            id=run_id,
            resume="allow",
            config={key: value for key, value in start.settings.items() if value is not None},
            settings=wandb.Settings(base_url=observe.wandb_host, console="off", silent=True, **_timeouts(observe)),
        )
    except (wandb.errors.CommError, wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
        raise ConfigError.of(
            f"Weights & Biases refuses the run: {error}",
            key="use_wandb",
            value=observe.use_wandb,
            hint="correct the wandb_* keys, or set WANDB_MODE=offline",
        ) from error


def _new_id(path: Path) -> str:
    """Creates a run id and stores it in the file."""
    made = secrets.token_hex(4)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made + "\n", encoding="utf-8")
    return made
