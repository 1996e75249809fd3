"""The files of an evaluation: results, single documents, and measures of a text, as JSON."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import time
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.errors import ConfigError, RunError
from megatron.log import get_logger


def results_path(prefix: str, now: time.struct_time | None = None, what: str = "results", suffix: str = "json") -> Path:
    """`[<prefix>_]eval_<what>_<date>.<suffix>`; the prefix may hold folders.

    Args:
        prefix: Start of the name.
        now: The date, this moment's if not given.
        what: What the file holds.
        suffix: The file's type.
    """
    name = f"eval_{what}_{time.strftime('%m-%d-%Y-%H-%M-%S', now or time.localtime())}.{suffix}"
    return Path(f"{prefix}_{name}" if prefix else name)


def require_writable(prefix: str) -> None:
    """Makes the folder of the results. Raises ConfigError where nothing can be written into it, before any work."""
    folder = results_path(prefix).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, os.strerror(13))
    except OSError as error:
        raise ConfigError.of(
            f"no results can be written into {folder} ({error.strerror})",
            key="eval_results_prefix",
            value=prefix,
            hint="name a folder that can be written",
        ) from error


def write_results(prefix: str, record: Mapping[str, Any]) -> None:
    """Writes `[<prefix>_]eval_results_<date>.json`."""
    _write_new(results_path(prefix), json_text(record))


def write_samples(prefix: str, results: Mapping[str, Any]) -> None:
    """Writes what lm-eval has of each document, a line each, to `[<prefix>_]eval_samples_<task>_<date>.jsonl`."""
    now = time.localtime()
    for task, samples in (results.get("samples") or {}).items():
        path = results_path(prefix, now, f"samples_{re.sub(r'[^A-Za-z0-9._-]', '_', task)}", "jsonl")
        lines = [json.dumps(_plain(each), default=str, allow_nan=False, ensure_ascii=False) for each in samples]
        _write_new(path, "".join(f"{line}\n" for line in lines))


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record to that file, over an earlier one."""
    _write(path, json_text(record), "w")


def json_text(record: Mapping[str, Any]) -> str:
    """A record as indented JSON, in which what is no number is null."""
    return json.dumps(_plain(record), indent=4, default=str, allow_nan=False) + "\n"


def native(value: Any) -> Any:
    """A number or an array of numpy or torch as Python's own; everything else as it is."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | torch.Tensor) else value


def _write_new(path: Path, text: str) -> None:
    """Writes a file that is not there yet: another evaluation may have ended in the same second."""
    free = path
    for number in itertools.count(2):
        try:
            _write(free, text, "x")
            break
        except FileExistsError:
            free = path.with_name(f"{path.stem}-{number}{path.suffix}")


def _write(path: Path, text: str, mode: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise
    except OSError as error:
        raise RunError.of(f"cannot write the results ({error.strerror})", location=str(path)) from error
    get_logger(__name__).info("results written to %s", path)


def _plain(value: Any) -> Any:
    """A record as JSON can hold it: what is not a number (NaN, infinite) becomes null, arrays and sets become lists."""
    value = native(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    if isinstance(value, Real) and not isinstance(value, int):
        return float(value) if math.isfinite(value) else None
    return value
