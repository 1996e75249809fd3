"""Serializes a Config for workers: a file in the run directory, or base64 text without a shared file system.

The format is JSON with flat keys, derived ones included, so a worker derives nothing.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from pathlib import Path

from megatron.atomic import write_atomic
from megatron.config.config import FIELDS, Config
from megatron.errors import ConfigError


def to_json(config: Config) -> str:
    """Returns JSON with one key per line."""
    return json.dumps(config.flat(), indent=1, ensure_ascii=False, allow_nan=True) + "\n"


def from_json(text: str, location: str = "the configuration handed to the worker") -> Config:
    """Parses the output of `to_json`. Raises ConfigError where the text is no configuration."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError.of(f"this is not a resolved configuration: {error}", location=location) from error
    if not isinstance(values, dict):
        raise ConfigError.of("this is not a resolved configuration", location=location)
    return Config.from_flat(values)


def write(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes the configuration atomically."""
    write_atomic(Path(path), to_json(config))


def read(path: str | os.PathLike[str]) -> Config:
    """Reads a file of `write`. Raises ConfigError when it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError.of(f"the resolved configuration cannot be read: {error}", location=str(path)) from error
    return from_json(text, str(path))


def encode(config: Config) -> str:
    """Encodes the configuration as compressed base64, short enough for a command line.

    Defaults are left out, and so is `config_files`, which the run directory has.
    """
    found = {name: value for name, value in config.flat().items() if value != FIELDS[name].default}
    found.pop("config_files", None)
    plain = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    return base64.urlsafe_b64encode(zlib.compress(plain.encode(), 9)).decode()


def decode(text: str) -> Config:
    """Decodes the output of `encode`. Raises ConfigError where the text is damaged."""
    try:
        plain = zlib.decompress(base64.urlsafe_b64decode(text.encode())).decode()
    except (ValueError, zlib.error) as error:
        raise ConfigError.of(f"the encoded configuration is damaged: {error}") from error
    return from_json(plain)
