"""Checks dependencies before starting workers and reports them as config errors.

DeepSpeed compiles its Adam for the host once, on first use, with g++, ninja and Python's headers. The compiled library
is cached (see extensions_dir.py); from then on only ninja is needed, to check whether it is up to date.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron.config import Config
from megatron.errors import ConfigError, ConfigIssue
from megatron.extensions_dir import extensions_folder, not_writable
from megatron.registry import CPU_OFFLOAD, OPTIMIZERS

HOST_ADAM = "cpu_adam"
"""DeepSpeed's name of the operator."""
CPUINFO = Path("/proc/cpuinfo")


FP16_FLAGS = {"avx512_fp16", "amx_fp16", "fphp"}
"""Names of fp16 arithmetic in /proc/cpuinfo, on x86 and on ARM."""


def check(
    accelerator: str,
    environment: Mapping[str, str],
    *,
    precision: str | None = None,
    zero: Mapping[str, Any] | None = None,
    gpu_layers: Iterable[str] = (),
    kernels: Iterable[ConfigIssue] = (),
    host_adam: bool = False,
) -> None:
    """Raises ConfigError with everything that is missing.

    Args:
        accelerator: "cuda" or "cpu".
        environment: of the workers.
        precision: the key precision.
        zero: the ZeRO block.
        gpu_layers: keys of layers that need a GPU.
        kernels: issues of kernels that are asked for by name.
        host_adam: whether DeepSpeed's Adam for the host is compiled.
    """
    missing = [
        ConfigIssue(f"the package {name} is not installed", hint="pip install -r requirements/requirements.txt")
        for name in ("torch", "deepspeed")
        if find_spec(name) is None
    ]
    if accelerator == "cpu" and precision == "fp16" and not computes_in_fp16(CPUINFO):
        missing.append(
            ConfigIssue(
                "this processor does not compute in fp16",
                key="precision",
                value=precision,
                hint="write precision: bfloat16, which needs no loss scale, or fp32",
            )
        )
    if accelerator == "cpu":
        what, hint = "Transformer Engine computes on NVIDIA GPUs, and this run has none", "leave it out"
        missing += [ConfigIssue(what, key=key, value=True, hint=hint) for key in gpu_layers]
    if any(isinstance(value, Mapping) and value.get("device") == "nvme" for value in (zero or {}).values()):
        missing += [*missing_for_disk(environment), *_folder_issues(extensions_folder(environment))]
    if host_adam:
        missing += _folder_issues(op_folder(environment))
        missing += missing_for_build(environment, built=(op_folder(environment) / f"{HOST_ADAM}.so").exists())
    ConfigError.raise_any([*missing, *kernels])


def gpu_layers(config: Config, script: str | Path) -> tuple[str, ...]:
    """Returns the keys of layers that need a GPU; only training uses them."""
    return config.transformer_engine.layers if Path(script).name == "train.py" else ()


def uses_host_adam(config: Config, script: str | Path) -> bool:
    """Returns whether the optimizer is DeepSpeed's for the host; only training uses it."""
    offloads = OPTIMIZERS.entry(config.optimizer.optimizer_type).traits >= CPU_OFFLOAD
    return Path(script).name == "train.py" and offloads


def computes_in_fp16(cpuinfo: Path) -> bool:
    """Returns whether the CPU has fp16 arithmetic. cpuinfo: /proc/cpuinfo."""
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return False
    lines = [line.partition(":")[2] for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return any(FP16_FLAGS & set(line.split()) for line in lines)


def missing_for_disk(environment: Mapping[str, str]) -> list[ConfigIssue]:
    """Returns the issues of offloading to a disk: DeepSpeed compiles its I/O against libaio."""
    flags = [*shlex.split(environment.get("CFLAGS", "")), *shlex.split(environment.get("LDFLAGS", ""))]
    command = [environment.get("CXX") or "g++", "-x", "c++", "-", "-o", os.devnull, *flags, "-laio"]
    program = "#include <libaio.h>\nint main() { io_context_t context = 0; return io_setup(1, &context); }\n"
    try:
        built = subprocess.run(
            command, check=False, input=program, text=True, capture_output=True, env=dict(environment)
        )
    except FileNotFoundError:
        return [ConfigIssue("there is no C++ compiler: offloading to a disk needs one", hint="install g++")]
    if built.returncode == 0:
        return []
    what = "there is no libaio: offloading to a disk (device: nvme) needs it"
    return [ConfigIssue(what, key="zero_optimization", hint="install it (Debian: libaio-dev), or write device: cpu")]


def _folder_issues(folder: Path) -> tuple[ConfigIssue, ...]:
    """Returns the issue of a folder for compiled operators that cannot be made, or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ()
    except OSError as error:
        return not_writable(folder, error).issues


def op_folder(environment: Mapping[str, str]) -> Path:
    """Returns the folder of DeepSpeed's compiled Adam for the host."""
    return extensions_folder(environment) / HOST_ADAM


def missing_for_build(environment: Mapping[str, str], *, built: bool) -> list[ConfigIssue]:
    """Returns the issues of DeepSpeed's build. built: whether the library exists."""
    purpose = "DeepSpeed compiles its optimizer for the host once, and needs it"
    # Workers look in the interpreter's own folder first, as in an activated virtual environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    missing = []
    if shutil.which("ninja", path=path) is None:
        missing.append(ConfigIssue(f"there is no ninja: {purpose}", hint="pip install ninja"))
    if built:
        return missing
    if shutil.which(environment.get("CXX") or "g++", path=path) is None:
        missing.append(
            ConfigIssue(f"there is no C++ compiler: {purpose}", hint="install g++ (Debian: apt install g++)")
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        name = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        missing.append(ConfigIssue(f"there is no Python.h: {purpose}", hint=f"install the headers (Debian: {name})"))
    return missing
