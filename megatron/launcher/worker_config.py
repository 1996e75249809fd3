"""Hands the configuration to the workers: the launcher's argument, and how a worker reads it.

The argument is `--run-config FILE`, the file in the run directory, or `--megatron-config BASE64` where hosts share no
file system. Workers that torchrun, srun or mpirun started get configuration files and flags, and resolve them here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.config import Config, Resolution, Resources, resolve, serialize
from megatron.config.schema.launch import LaunchSection
from megatron.errors import ConfigError
from megatron.launcher.arguments import read_request
from megatron.launcher.hosts import Accelerator, local_devices
from megatron.launcher.preflight import check, gpu_layers, uses_host_adam
from megatron.launcher.resolve import refuse_unsupported
from megatron.launcher.restart import restarted_by_scheduler, resume_overrides
from megatron.launcher.run_directory import CONFIG_FILE, choose_run_directory, prepare_run_directory
from megatron.plan.base_shapes import check_base_shapes
from megatron.plan.kernel_choices import kernel_issues
from megatron.ranks import Ranks

RUN_CONFIG, ENCODED_CONFIG = "--run-config", "--megatron-config"


def config_argument(config: Config, folder: Path, *, shared: bool, file: Path | None = None) -> tuple[str, str]:
    """Returns the arguments with the configuration: a file, or base64 text without a shared file system.

    Args:
        config: the resolved configuration.
        folder: the run directory.
        shared: whether all workers see its files.
        file: what `prepare_run_directory` wrote for them; a dry run, which writes none, shows the last launch's.
    """
    if shared or config.data.use_shared_fs:
        return RUN_CONFIG, str(file or folder / CONFIG_FILE)
    return ENCODED_CONFIG, serialize.encode(config.replace(log_dir=str(folder)))


def worker_config(arguments: Sequence[str]) -> Config:
    """Returns the configuration of a worker. Raises ConfigError.

    It is read from `--run-config FILE` or `--megatron-config BASE64`, else from configuration files and flags.
    """
    given_config = _given_config(arguments)
    if given_config is not None:
        return given_config
    return _resolve_here(arguments)


def _given_config(arguments: Sequence[str]) -> Config | None:
    for position, argument in enumerate(arguments):
        name, equals, text = argument.partition("=")
        name = name.replace("_", "-")
        if name not in {RUN_CONFIG, ENCODED_CONFIG}:
            continue
        if not equals:
            text = arguments[position + 1] if position + 1 < len(arguments) else ""
        return serialize.read(text) if name == RUN_CONFIG else serialize.decode(text)
    return None


def _resolve_here(arguments: Sequence[str]) -> Config:
    """Resolves files and flags on every rank; rank 0 writes the run directory."""
    script = str(Path(sys.argv[0]))
    given = [word for word in arguments if not word.replace("_", "-").startswith("--local-rank")]
    if not any(word and not word.startswith("-") for word in given):
        raise ConfigError.of(
            "no configuration file is named",
            location=script,
            hint=f"./deepy.py {Path(script).name} CONF ..., or python {Path(script).name} CONF ...",
        )
    request = read_request([script, *given])
    accelerator: Accelerator = "cuda" if local_devices(os.environ) else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", accelerator)

    def resources(_launch: LaunchSection) -> Resources:
        return Resources(Ranks.from_environment().world_size, accelerator)

    resolution: Resolution = resolve(request.files, request.flags, resources, request.issues)
    if restarted_by_scheduler(os.environ):
        resolution = resolve(request.files, {**request.flags, **resume_overrides(resolution.config)}, resources)
    refuse_unsupported(resolution)
    config = resolution.config
    check_base_shapes(config)
    check(
        accelerator,
        os.environ,
        precision=config.precision.precision,
        zero=config.deepspeed.zero_optimization,
        gpu_layers=gpu_layers(config, script),
        kernels=kernel_issues(config, accelerator),
        host_adam=uses_host_adam(config, script),
    )
    folder = choose_run_directory(config.observe.log_dir, config.checkpoint.save, request.files, request.script)
    config = config.replace(log_dir=str(folder))
    if Ranks.from_environment().rank == 0:
        for line in resolution.warnings:
            print(f"warning: {line}", file=sys.stderr)
        prepare_run_directory(folder, config, sys.argv)
    return config
