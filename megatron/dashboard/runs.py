"""Data of the dashboard: curves, ranks and configuration of runs, read from their run directories.

Files are read again when they have grown, so the page follows a running run from any machine that sees its folder.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError
from megatron.metrics import read_metrics

CONFIG, METRICS, RANKS = "config.json", "metrics.jsonl", "ranks.jsonl"
MAX_POINTS = 1500  # of a curve
PER_RUN_KEYS = frozenset({"config_files", "git_hash", "local_rank", "log_dir", "rank", "save", "user_script"})
"""Keys that differ between any two runs."""

Curve = list[tuple[int, float]]


@dataclass
class Run:
    """One run directory."""

    name: str
    """Its name on the page."""
    folder: Path
    """Its path."""
    _read: dict[str, tuple[tuple[int, int], Any]] = field(default_factory=dict)

    def curves(self) -> dict[str, Curve]:
        """Returns metric -> points (iteration, value), downsampled for display."""
        found: dict[str, Curve] = self._read_cached(METRICS, _curves)
        return found

    def ranks(self) -> dict[str, Any]:
        """Returns the columns of the last rank report: `host`, `data_wait` [s], `probe` [s]; {} for one rank."""
        found: dict[str, Any] = self._read_cached(RANKS, _last_line)
        return found

    def config(self) -> dict[str, Any]:
        """Returns the resolved configuration; {} where the folder has none."""
        found: dict[str, Any] = self._read_cached(CONFIG, _mapping)
        return found

    def age(self) -> float | None:
        """Returns the seconds since the last record; None before the first."""
        path = self.folder / METRICS
        return time.time() - path.stat().st_mtime if path.exists() else None

    def _read_cached(self, name: str, read: Any) -> Any:
        path = self.folder / name
        try:
            stat = path.stat()
        except OSError:
            return {}
        seen = (stat.st_mtime_ns, stat.st_size)
        if name not in self._read or self._read[name][0] != seen:
            try:
                self._read[name] = (seen, read(path))
            except (OSError, ValueError, TypeError, KeyError, AttributeError):  # being written, or another program's
                return self._read.get(name, (seen, {}))[1]
        return self._read[name][1]


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Opens the runs of these folders, under the shortest unique names.

    A folder may also be a `save` folder, whose logs/ is the run directory. Raises ConfigError for one that is neither.
    """
    found = list(dict.fromkeys(_run_directory(folder) for folder in folders))
    for depth in range(1, max(len(folder.parts) for folder in found) + 1 if found else 1):
        names = [_name(folder, depth) for folder in found]
        if len(set(names)) == len(found):
            return [Run(name, folder) for name, folder in zip(names, found, strict=True)]
    return [Run(str(folder), folder) for folder in found]  # one is in the other's logs/


def snapshot(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the data of the page as JSON values."""
    shown = [
        {"name": run.name, "folder": str(run.folder), "age": run.age(), "curves": run.curves(), "ranks": run.ranks()}
        for run in runs
    ]
    return {"runs": shown, "differences": differences([run.config() for run in runs])}


def differences(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the keys on which configurations differ: {key, values}, with one value per configuration."""
    keys = sorted(set().union(*configs) - PER_RUN_KEYS) if len(configs) > 1 else []
    rows = [{"key": key, "values": [config.get(key) for config in configs]} for key in keys]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"][1:])]


def downsample(points: Curve, max_points: int = MAX_POINTS) -> Curve:
    """Returns at most `max_points` points: minimum and maximum of each stretch, so that spikes stay visible."""
    if len(points) <= max_points:
        return points
    width = math.ceil(2 * len(points) / max_points)
    selected: Curve = []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        selected += sorted(ends)
    return selected


def _run_directory(folder: Path) -> Path:
    for candidate in (folder, folder / "logs"):
        if (candidate / METRICS).is_file() or (candidate / CONFIG).is_file():
            return candidate.resolve()
    raise ConfigError.of(
        f"this folder holds neither {METRICS} nor {CONFIG}",
        location=str(folder),
        hint="name a run directory, or the save folder of a run",
    )


def _name(folder: Path, depth: int) -> str:
    parts = [part for part in folder.parts if part != "logs"] or list(folder.parts)
    return "/".join(parts[-depth:])


def _curves(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for record in read_metrics(path):
        for name, value in record.items():
            if name != "iteration" and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((int(record["iteration"]), value))
    return {name: downsample(points) for name, points in sorted(curves.items())}


def _last_line(path: Path) -> dict[str, Any]:
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    return dict(json.loads(lines[-1])) if lines else {}


def _mapping(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
