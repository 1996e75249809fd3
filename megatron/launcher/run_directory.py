"""The run directory: configuration, sources, versions, logs and metrics of a run.

It is log_dir, else <save>/logs, else runs/<configuration names>-<date>. A script other than train.py uses a subfolder,
so that sampling from a run does not overwrite its files. A restart appends: the last configuration is renamed when it
differs, and `launches.jsonl` gains a line.

    config.json      the resolved configuration of the last launch, without secrets
    configs/         that of each launch, by its contents, which the workers read; another launch changes none of them
    sources/         the configuration files
    launches.jsonl   one object per launch: time, host, command line, versions, git revision
    rank_N.log       output of rank N; launcher.log: output of DeepSpeed's launcher
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron.atomic import open_lines, write_atomic
from megatron.config import Config, serialize
from megatron.config.secrets import arguments_without_secrets
from megatron.errors import RunError

CONFIG_FILE = "config.json"
CONFIGS = "configs"
PACKAGES = ("neox", "torch", "deepspeed", "transformers", "tokenizers", "numpy", "pydantic", "lm_eval", "datasets")


def choose_run_directory(log_dir: str | None, save: str | None, files: Sequence[str], script: Path) -> Path:
    """Returns the absolute run directory, without creating it.

    Args:
        log_dir: the key log_dir.
        save: the key save.
        files: configuration files.
        script: the worker script.
    """
    if log_dir is not None:
        folder = Path(log_dir)
    elif save is not None:
        folder = Path(save) / "logs"
    else:
        names = "-".join(Path(name).stem for name in files) or script.stem
        folder = Path("runs") / f"{names[:80]}-{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}"
    if script.name != "train.py":
        folder = folder / script.stem
    return folder.absolute()


def prepare_run_directory(folder: Path, settings: Config, arguments: Sequence[str]) -> Path:
    """Writes configuration, sources and the launch record; returns the configuration file for the workers.

    Raises RunError when the folder cannot be written.

    Args:
        folder: the run directory.
        settings: the resolved configuration; where it holds a secret, only this user may read its file.
        arguments: the command line.
    """
    shown = settings.without_secrets()
    config_text, own_text = serialize.to_json(shown), serialize.to_json(settings)
    try:
        own = folder / CONFIGS / f"{hashlib.sha256(own_text.encode()).hexdigest()[:12]}.json"
    except UnicodeEncodeError as error:  # keys were checked, so it is the name of the working directory
        raise RunError.of(
            "the run directory's name holds bytes that are not UTF-8",
            location=str(folder),
            hint="start the run in a directory with another name",
        ) from error
    try:
        (folder / "sources").mkdir(parents=True, exist_ok=True)
        for name, text in (shown.checkpoint.config_files or {}).items():
            (folder / "sources" / name).write_text(text, encoding="utf-8")
        config = folder / CONFIG_FILE
        if config.exists() and config.read_text(encoding="utf-8") != config_text:
            config.rename(_free_path(folder))
        write_atomic(config, config_text)
        own.parent.mkdir(exist_ok=True)
        write_atomic(own, own_text)
        if shown != settings:
            own.chmod(0o600)
        with open_lines(folder / "launches.jsonl") as launches:
            launches.write(json.dumps(_launch_record(arguments_without_secrets(arguments))) + "\n")
    except OSError as error:
        raise RunError.of(
            f"the run directory cannot be written: {error.strerror}",
            location=str(error.filename or folder),
            hint="give a folder that can be written as log_dir or save",
        ) from error
    return own


def _free_path(folder: Path) -> Path:
    number = 1
    while (path := folder / f"config.{number}.json").exists():
        number += 1
    return path


def _launch_record(arguments: Sequence[str]) -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": platform.node(),
        "folder": os.getcwd(),
        "command": list(arguments),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": versions,
        "git": git_revision(Path(__file__).parent),
    }


def git_revision(folder: Path) -> str | None:
    """Returns the commit of the checkout, with "+" for uncommitted changes; None outside a checkout or without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
