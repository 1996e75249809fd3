"""Entry point of workers: reads the configuration, handles stop signals, maps errors to exit codes.

A worker script (train.py, generate.py, evaluate.py, a tool) is one function of the Config and one line:

    sys.exit(worker_main(main, sys.argv[1:]))

deepy.py starts workers with `--run-config FILE`, or `--megatron-config BASE64` without a shared file system. Under
torchrun, srun or mpirun the same script takes the configuration files and flags themselves, and reads the rank from
their environment variables.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol, Self

from megatron import log
from megatron.config import Config
from megatron.errors import INTERRUPTED, ConfigError, RunError
from megatron.launcher.rank_env import set_rank_env
from megatron.launcher.worker_config import worker_config
from megatron.output_streams import ignore_lost_output
from megatron.plan.base_shapes import write_base_shapes
from megatron.ranks import Ranks

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
    ignore_lost_output()
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
        code = main(config) or 0
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
    return _finish(code)


def _exit(code: int) -> int:
    """Ends the process at once if there are several ranks: exit handlers could wait for ranks in a collective."""
    if Ranks.from_environment().world_size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _finish(code: int) -> int:
    """Ends a process of several ranks after its exit handlers, without the interpreter's finalization.

    Threads of the store and of the process groups still run then, and destroying them has aborted finished runs.
    """
    if Ranks.from_environment().world_size > 1:
        threading._shutdown()  # type: ignore[attr-defined]  # joins threads, as the interpreter does
        atexit._run_exitfuncs()
    return _exit(code)


def wrote_base_shapes(config: Config) -> bool:
    """Writes the base shapes on rank 0 if save_base_shapes is set; returns whether it is set."""
    if config.mup.save_base_shapes and Ranks.from_environment().rank == 0:
        print(write_base_shapes(config))
    return config.mup.save_base_shapes
