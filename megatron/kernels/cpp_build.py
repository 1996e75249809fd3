"""Our own compiled loops: csrc/ becomes a library for this processor, once, where there is a compiler.

The library is plain C++ without torch's headers, so it takes seconds to make. It is kept beside the other compiled
extensions of this environment, under a name that changes with the source, the flags, the compiler and the processor.
Workers that start together take turns, by a lock that the kernel drops when a process dies.
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
from megatron.extensions_dir import extensions_folder
from megatron.log import get_logger

FOLDER = Path(__file__).parent / "csrc"
SOURCES = tuple(FOLDER / name for name in ("decode.cpp", "linear.cpp"))
HEADERS = (FOLDER / "bfloat16.h",)
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC")
SWITCH = "NEOX_NATIVE_KERNELS"
"""Set to 0, this variable of the environment leaves the library out."""
_SECONDS = 300.0


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled library, or why there is none, as a sentence. Compiles it where that was never done."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 switches our compiled kernels off."
    found = compiled(extensions_folder(os.environ) / "neox_kernels", os.environ.get("CXX") or "g++")
    if isinstance(found, str):
        get_logger(__name__).info("decoding goes on without the compiled kernels: %s", found)
        return found
    return ctypes.CDLL(str(found))


def compiled(folder: Path, compiler: str) -> Path | str:
    """The library's file in that folder, made if it is not there; or why it cannot be, as a sentence."""
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
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{FOLDER} cannot be compiled into {folder}: {error}."
    return file


def _fingerprint(program: str) -> str:
    """What the compiled file depends on."""
    asked = [program, "--version"]
    version = subprocess.run(asked, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.is_file() else []
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    sources = [source.read_text(encoding="utf-8") for source in (*HEADERS, *SOURCES)]
    parts = [*sources, *FLAGS, version, platform.machine(), *processor]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
