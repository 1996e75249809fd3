"""Compiles DeepSpeed's ops at first use: one process at a time, in a folder of this installation.

torch guards the folder with a lock file that must not exist; a process killed while compiling leaves it, and later
processes wait for it forever. The lock here is released by the kernel, so a process that holds it may delete a stale
torch lock file.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron import extensions_dir


@contextmanager
def build_lock(builder: Any) -> Iterator[None]:
    """Holds the build lock while the op of one of DeepSpeed's builders is loaded.

    Raises ConfigError where its folder cannot be written.
    """
    from torch.utils.cpp_extension import _get_build_directory

    prepend_interpreter_to_path(os.environ)
    os.environ.setdefault(extensions_dir.VARIABLE, str(extensions_dir.extensions_folder(os.environ)))
    try:
        folder = Path(_get_build_directory(builder.name, verbose=False))
        turn = (folder / "in_use").open("w")
    except OSError as error:
        raise extensions_dir.not_writable(os.environ[extensions_dir.VARIABLE], error) from error
    with turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


def prepend_interpreter_to_path(environment: MutableMapping[str, str]) -> None:
    """Puts the folder of this interpreter first in PATH, as an activated virtual environment does.

    DeepSpeed asks ninja whether its compiled operators are up to date. Two versions of ninja ignore each other's
    records, so alternating between them would recompile for half a minute every time.
    """
    programs = str(Path(sys.executable).parent)
    others = [part for part in environment.get("PATH", "").split(os.pathsep) if part and part != programs]
    environment["PATH"] = os.pathsep.join([programs, *others])
