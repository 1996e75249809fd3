"""DeepSpeed's ops that are compiled at first use: by one process at a time, into a folder of this installation.

torch guards the folder with a file that must not be there; a process that is killed in that moment leaves it, and every
later one waits for it without end. So processes take turns by a lock that the kernel releases, and whoever has it knows
that such a file is nobody's.
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
    """Around the loading of the op of one of DeepSpeed's builders."""
    from torch.utils.cpp_extension import _get_build_directory

    own_programs_first(os.environ)
    os.environ.setdefault(extensions_dir.VARIABLE, str(extensions_dir.extensions_folder(os.environ)))
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with (folder / "in_use").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


def own_programs_first(environment: MutableMapping[str, str]) -> None:
    """Puts the folder of this interpreter first in PATH, as an activated virtual environment does.

    DeepSpeed asks ninja whether its compiled collectives are up to date. Two versions of ninja do not believe each
    other's records, so finding now one and now the other would compile them again, for half a minute, every time.
    """
    programs = str(Path(sys.executable).parent)
    others = [part for part in environment.get("PATH", "").split(os.pathsep) if part and part != programs]
    environment["PATH"] = os.pathsep.join([programs, *others])
