"""The folder of compiled extensions of this installation.

torch keeps one folder for all installations of a Python version, and compiles again whenever another one asks, since
the paths of the headers differ. Two checkouts used in turn would compile for half a minute at every start, so each
environment gets a folder of its own.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron.errors import ConfigError

VARIABLE = "TORCH_EXTENSIONS_DIR"


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Returns TORCH_EXTENSIONS_DIR, else a folder of this Python environment in the user's cache."""
    chosen = environment.get(VARIABLE)
    if chosen:
        return Path(chosen)
    cache = user_cache(environment)
    version = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    digest = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    return cache / "torch_extensions" / f"neox_{version}_{digest}"


def user_cache(environment: Mapping[str, str]) -> Path:
    """Returns XDG_CACHE_HOME, else `~/.cache`. Raises ConfigError for a user without a home folder."""
    chosen = environment.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigError.of(
            "this user has no home folder to keep compiled extensions and other caches in",
            location="environment",
            hint="set HOME to a folder that can be written, or XDG_CACHE_HOME",
        ) from error


def not_writable(folder: str | Path, error: OSError) -> ConfigError:
    """Returns the error of an operator that must be compiled, in a folder of extensions that cannot be written."""
    return ConfigError.of(
        f"operators cannot be compiled into this folder: {error.strerror or error}",
        location=str(folder),
        hint=f"set {VARIABLE} or XDG_CACHE_HOME to a folder that this user can write, the same on every host",
    )
