"""Compiles csrc/ to a library for this CPU, once, if there is a compiler.

The library is plain C++ without torch's headers, so it compiles in seconds. It is stored beside the other compiled
extensions of this environment, under a name that depends on the source, the flags, the compiler and the CPU. Workers
that start together take turns, by a lock that the kernel releases when a process dies.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from megatron.atomic import atomic_path
from megatron.errors import ConfigError
from megatron.extensions_dir import VARIABLE, extensions_folder
from megatron.log import get_logger

FOLDER = Path(__file__).parent / "csrc"
SOURCES = tuple(sorted(FOLDER.glob("*.cpp")))
HEADERS = tuple(sorted(FOLDER.glob("*.h")))
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC")
SWITCH = "NEOX_NATIVE_KERNELS"
"""Environment variable that disables the library if it is 0."""
_SECONDS = 300.0


@functools.cache
def library() -> ctypes.CDLL | str:
    """Returns the compiled library, or the reason why there is none. Compiles it if necessary."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 switches our compiled kernels off."
    try:
        found: Path | str = compiled(extensions_folder(os.environ) / "neox_kernels", os.environ.get("CXX") or "g++")
    except ConfigError as error:  # there is no home folder
        found = f"They cannot be compiled: {error}."
    if isinstance(found, str):
        get_logger(__name__).info("attention and decoding go on without the compiled kernels: %s", found)
        return found
    return ctypes.CDLL(str(found))


def library_unavailable() -> str | None:
    """Returns the reason why there is no compiled library, or None. May compile it."""
    found = library()
    return found if isinstance(found, str) else None


def loaded_library() -> ctypes.CDLL:
    """Returns the compiled library, which `library_unavailable` has said to exist."""
    found = library()
    assert isinstance(found, ctypes.CDLL), found
    return found


def compiled(folder: Path, compiler: str) -> Path | str:
    """Returns the library's file in that folder, compiling it if necessary, or the reason why it cannot be."""
    program = shutil.which(compiler)
    if program is None:
        return f"There is no C++ compiler ({compiler}; the variable CXX names another)."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"kernels-{_fingerprint(program)}.so"
        with (folder / "in_use").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            if not file.exists():
                with atomic_path(file) as temporary:
                    command = [program, *FLAGS, *map(str, SOURCES), "-o", str(temporary)]
                    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.CalledProcessError as error:
        return f"{program} cannot compile {FOLDER}: {(error.stderr or '').strip()[:500] or error}."
    except OSError as error:
        reason = error.strerror or error
        return f"{FOLDER} cannot be compiled into {folder}: {reason}; the variable {VARIABLE} names another folder."
    except subprocess.TimeoutExpired as error:
        return f"{FOLDER} cannot be compiled into {folder}: {error}."
    return file


def _fingerprint(program: str) -> str:
    """Returns a hash of everything that the compiled file depends on."""
    asked = [program, "--version"]
    version = subprocess.run(asked, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.is_file() else []
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    sources = [source.read_text(encoding="utf-8") for source in (*HEADERS, *SOURCES)]
    parts = [*sources, *FLAGS, version, platform.machine(), *processor]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
