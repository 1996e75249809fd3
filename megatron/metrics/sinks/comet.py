"""Metrics as a Comet experiment; needs the optional package `comet_ml`.

The experiment's key is stored beside the metrics, so that a restart continues the same experiment. Without network
access COMET_START_ONLINE=0 writes everything to the run directory, for `comet upload`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import comet_ml

from megatron.errors import ConfigError
from megatron.metrics.sinks.base import Observe, Start

KEY_FILE = "comet_experiment_key"
NO = frozenset({"0", "false", "no"})


class Comet:
    """Logs each record at its iteration, under the record's own names."""

    def __init__(self, experiment: Any) -> None:
        self._experiment = experiment

    @classmethod
    def open(cls, observe: Observe, start: Start) -> Self:
        """Starts or continues an experiment. Raises ConfigError without a key."""
        online = os.environ.get("COMET_START_ONLINE", "1").lower() not in NO
        if online and comet_ml.config.get_api_key(None, comet_ml.config.get_config()) is None:
            raise ConfigError.of(
                "there is no key for Comet",
                key="use_comet",
                value=observe.use_comet,
                hint="run `comet login`, set COMET_API_KEY, or keep the experiment here with COMET_START_ONLINE=0",
            )
        directory = Path(observe.log_dir or ".")
        directory.mkdir(parents=True, exist_ok=True)
        known = _read_stored_key(directory, start)
        experiment = comet_ml.start(
            workspace=observe.comet_workspace,
            project=observe.comet_project,
            experiment_key=known,
            mode="get_or_create" if known else "create",
            online=online,
            experiment_config=comet_ml.ExperimentConfig(
                name=observe.comet_experiment_name,
                tags=list(observe.comet_tags or ()),
                offline_directory=str(directory),
                log_code=False,
                parse_args=False,
                display_summary_level=0,
                auto_output_logging=False,
                auto_metric_logging=False,
                auto_param_logging=False,
            ),
        )
        (directory / KEY_FILE).write_text(experiment.get_key() + "\n", encoding="utf-8")
        experiment.log_parameters({key: value for key, value in start.settings.items() if value is not None})
        experiment.log_others(observe.comet_others or {})
        return cls(experiment)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._experiment.log_metrics(dict(metrics), step=iteration)

    def close(self) -> None:
        self._experiment.end()


def _read_stored_key(directory: Path, start: Start) -> str | None:
    path = directory / KEY_FILE
    return path.read_text(encoding="utf-8").strip() if start.iteration > 0 and path.is_file() else None
