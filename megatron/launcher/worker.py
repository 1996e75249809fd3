"""Entry point of workers: reads the configuration, handles stop signals, maps errors to exit codes.

A worker script (train.py, generate.py, evaluate.py, a tool) is one function of the Config and one line:

    sys.exit(worker_main(main, sys.argv[1:]))

deepy.py starts workers with `--run-config FILE`, or `--megatron-config BASE64` without a shared file system. Under
torchrun, srun or mpirun the same script takes the configuration files and flags themselves, and reads the rank from
their environment variables.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Self

from megatron import log
from megatron.config import Config, Resolution, Resources, resolve, serialize
from megatron.config.schema.launch import LaunchSection
from megatron.errors import INTERRUPTED, ConfigError, RunError
from megatron.launcher.arguments import read_request
from megatron.launcher.hosts import Accelerator, local_devices
from megatron.launcher.preflight import check, gpu_layers
from megatron.launcher.rank_env import set_rank_env
from megatron.launcher.resolve import refuse_unsupported
from megatron.launcher.restart import restarted_by_scheduler, resume_overrides
from megatron.launcher.run_directory import choose_run_directory, prepare_run_directory
from megatron.plan.base_shapes import check_base_shapes, write_base_shapes
from megatron.ranks import Ranks

RUN_CONFIG, ENCODED_CONFIG = "--run-config", "--megatron-config"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop(Protocol):
    """A request to stop in good order."""

    @property
    def requested(self) -> bool: ...

    def listen(self) -> None:
        """Starts to handle signals as requests to stop; before, they end the process at once."""


class StopSignal:
    """A request by signal to save and exit. The loop reads `requested` between two steps.

    SIGTERM and SIGUSR1, which schedulers send before they preempt a host, and the first Ctrl-C only set it; a second
    Ctrl-C interrupts at once. During start-up there is nothing to save, and each of them ends the process: by the
    kernel, since a Python handler would not run while torch waits for other ranks.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @classmethod
    def install(cls) -> Self:
        """Creates a StopSignal during start-up."""
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        return cls()

    def listen(self) -> None:
        """Installs the handlers, when there is something to save."""
        for each in STOP_SIGNALS:
            signal.signal(each, self._on_signal)

    @property
    def requested(self) -> bool:
        return self.received is not None

    def _on_signal(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


def worker_main(main: Callable[[Config], int | None], arguments: Sequence[str] | None = None) -> int:
    """Calls main with the configuration of the arguments and returns the exit code of the process.

    A ConfigError is 2 and a RunError 1, printed in one line per issue; an interruption is 130. Any other exception is
    an error of the program: its traceback is printed, and the code is 1.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        set_rank_env(os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr, flush=True)
        return ConfigError.exit_code
    try:
        log.configure()
        config = worker_config(given)
    except ConfigError as error:
        if Ranks.from_environment().rank == 0:  # the same on every rank
            print(error, file=sys.stderr, flush=True)
        return ConfigError.exit_code
    try:
        return main(config) or 0
    except (ConfigError, RunError) as error:
        ranks = Ranks.from_environment()
        name = f"rank {ranks.rank}: " if ranks.world_size > 1 else ""
        print("\n".join(f"{name}{issue}" for issue in error.issues), file=sys.stderr, flush=True)
        return _exit(error.exit_code)
    except KeyboardInterrupt:
        return _exit(INTERRUPTED)
    except Exception:  # noqa: BLE001 (whatever it is, it ends this rank and must not hang the others)
        traceback.print_exc()
        return _exit(RunError.exit_code)


def _exit(code: int) -> int:
    """Ends the process at once if there are several ranks: exit handlers could wait for ranks in a collective."""
    if Ranks.from_environment().world_size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def wrote_base_shapes(config: Config) -> bool:
    """Writes the base shapes on rank 0 if save_base_shapes is set; returns whether it is set."""
    if config.mup.save_base_shapes and Ranks.from_environment().rank == 0:
        print(write_base_shapes(config))
    return config.mup.save_base_shapes


def worker_config(arguments: Sequence[str]) -> Config:
    """Returns the configuration of a worker. Raises ConfigError.

    It is read from `--run-config FILE` or `--megatron-config BASE64`, else from configuration files and flags.
    """
    given_config = _config_argument(arguments)
    if given_config is not None:
        return given_config
    return _resolve_here(arguments)


def _config_argument(arguments: Sequence[str]) -> Config | None:
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
    )
    folder = choose_run_directory(config.observe.log_dir, config.checkpoint.save, request.files, request.script)
    config = config.replace(log_dir=str(folder))
    if Ranks.from_environment().rank == 0:
        for line in resolution.warnings:
            print(f"warning: {line}", file=sys.stderr)
        prepare_run_directory(folder, serialize.to_json(config), config.checkpoint.config_files or {}, sys.argv)
    return config
