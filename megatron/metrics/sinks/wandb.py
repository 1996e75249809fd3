"""Metrics as a Weights & Biases run; needs the optional package `wandb`.

The run's id is stored beside the metrics, so that a restart continues the same run. W&B never replaces a step, so a
resume before the run's last step starts a new run. Without network access WANDB_MODE=offline writes everything to the
run directory, for `wandb sync`; no service says the run's last step there, so it is stored beside the id.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import wandb

from megatron.atomic import write_atomic
from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.metrics.sinks.base import Observe, Start
from megatron.metrics.wandb_key import wandb_key

ID_FILE = "wandb_run_id"
DEFAULT_TIMEOUT = 20.0
"""Timeout of the service without `use_wandb: true` [s]."""
OFFLINE = frozenset({"offline", "dryrun"})
WITHOUT_KEY = OFFLINE | {"disabled"}


class WeightsAndBiases:
    """Logs each record at its iteration, under the record's own names."""

    def __init__(self, run: Any, stored: Path | None = None) -> None:
        """stored: the file of the id, where the last step is to be beside it."""
        self._run, self._stored = run, stored

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
        run_id, last = _stored(path) if start.iteration > 0 else (None, 0)
        run = None
        if run_id is not None and last <= start.iteration:
            run = _init_run(observe, start, run_id)
            last = run.starting_step - 1
        if run_id is not None and last > start.iteration:  # earlier steps would be silently dropped
            get_logger(__name__).info(
                "the Weights & Biases run %s has steps up to %d, which it does not replace: a new run starts at %d",
                run_id,
                last,
                start.iteration + 1,
            )
            if run is not None:
                run.finish()
            run = None
        if run is None:
            run = _init_run(observe, start, _new_id(path))
        return cls(run, path if mode in OFFLINE else None)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=iteration)
        if self._stored is not None:
            write_atomic(self._stored, f"{self._run.id}\n{iteration}\n")

    def close(self) -> None:
        """Ends the W&B run; while an error is raised, as a failed one."""
        self._run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


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


def _stored(path: Path) -> tuple[str | None, int]:
    """The run's id, None without one, and its last step, 0 where that is not stored."""
    found = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return (found[0] if found else None), (int(found[1]) if found[1:] else 0)


def _new_id(path: Path) -> str:
    """Creates a run id and stores it in the file."""
    made = secrets.token_hex(4)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made + "\n", encoding="utf-8")
    return made
