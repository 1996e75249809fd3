"""Agent of one rank: the process between DeepSpeed's launcher and a worker.

    python -m megatron.launcher.rank_agent [--log-dir DIR] [NAME=VALUE ...] SCRIPT ARGUMENT...

It relays output, signals and the exit code, which DeepSpeed's launcher does not do correctly:
- exit codes: the launcher exits 0 for a negative code of a child, so the agent returns 128 + signal, like a shell;
- stop signals: the launcher would terminate everything and kill it after 30 seconds, even while a checkpoint is
  written. deepy.py sends them to the agent over a socket, and the agent sends them to the worker only;
- output: every rank's is written to DIR/rank_N.log, and rank 0's is shown on deepy.py's terminal, whose file
  descriptors are passed over the same socket;
- orphans: when the launcher ends, the kernel signals the agent (PR_SET_PDEATHSIG), which kills the worker and its
  children; when the agent is killed the worker is too; and when the socket closes, deepy.py has ended.

On other hosts the socket is a TCP connection, and rank 0's output is shown by the launcher there. Messages are JSON
lines. To deepy.py: {"rank"}, {"rank", "pid"}, then {"rank", "code", "tail"}. From deepy.py: one byte with the
descriptors of the terminal (rank 0), then {"signal"}. Without a connection everything else works.
Imports only the standard library, to keep start-up fast.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

if not __package__:  # started as a file: PYTHONPATH may come with double quotes in it
    sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron.errors import ConfigError
from megatron.launcher.rank_env import set_rank_env
from megatron.output_streams import ignore_lost_output
from megatron.ranks import Ranks

PR_SET_PDEATHSIG = 1  # prctl(2)
SOCKET_VARIABLE = "NEOX_SUPERVISOR"
SAFE_PATH, SAFE_PATH_OF_AGENT = "PYTHONSAFEPATH", "NEOX_SAFE_PATH"
NETWORK = "tcp://"
CONNECT_SECONDS = 10.0
PARENT_GONE = signal.SIGUSR2
TAIL_LINES = 40
DRAIN_SECONDS = 1.0  # how long output may still come after the worker ended
CHUNK = 1 << 16
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


def shell_code(returncode: int) -> int:
    """Returns the exit code of a shell: 128 + n for a process that was killed by signal n."""
    return 128 - returncode if returncode < 0 else returncode


def die_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """Asks the kernel to send this process a signal when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)


class SupervisorConnection:
    """The socket to deepy.py; without one every method does nothing."""

    def __init__(self, rank: int, address: str | None) -> None:
        self.rank = rank
        self.terminal: list[int] = []
        self.socket: socket.socket | None = None
        self._pending = b""
        if address and address.startswith(NETWORK):
            self._connect_tcp(address)
        elif address:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(address)
            self.send()
            _, self.terminal, _, _ = socket.recv_fds(self.socket, 1, 3)

    def _connect_tcp(self, address: str) -> None:
        """Connects from another host, by tcp://HOST:PORT/TOKEN; the token authenticates a rank of that launch."""
        endpoint, _, token = address.removeprefix(NETWORK).partition("/")
        host, _, port = endpoint.rpartition(":")
        try:
            self.socket = socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS)
        except OSError as error:
            warning = (
                f"rank {self.rank}: deepy.py cannot be reached at {endpoint} ({error}); a stop signal will not arrive"
            )
            print(warning, file=sys.stderr, flush=True)
            return
        self.socket.settimeout(None)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
            self.socket.setsockopt(socket.IPPROTO_TCP, option, seconds)
        self.send(token=token, host=os.uname().nodename)

    def send(self, **message: Any) -> None:
        if self.socket is not None:
            with suppress(OSError):
                self.socket.sendall(json.dumps({"rank": self.rank, **message}).encode() + b"\n")

    def commands(self) -> list[dict[str, Any]] | None:
        """Returns the commands received since the last call; None when deepy.py has ended."""
        assert self.socket is not None
        try:
            received = self.socket.recv(CHUNK)
        except OSError:
            return None
        if not received:
            return None
        *lines, self._pending = (self._pending + received).split(b"\n")
        return [json.loads(line) for line in lines]


class OutputLog:
    """Output of a worker: its log file, its last lines, and the terminal if there is one."""

    def __init__(self, log: Path | None) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._log: BinaryIO | None = None
        self._partial: dict[int, bytes] = {}
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log = log.open("ab", buffering=0)

    def write(self, data: bytes, source: int, shown_on: int | None) -> None:
        """Stores data read from the descriptor `source`, and shows it."""
        if shown_on is not None:
            with suppress(OSError):  # the reader of a pipe may have left
                _write_all(shown_on, data)
        *lines, self._partial[source] = (self._partial.get(source, b"") + data).split(b"\n")
        for line in lines:
            self._write_line(line)

    def finish(self) -> None:
        for line in self._partial.values():
            if line:
                self._write_line(line)
        self._partial = {}

    def _write_line(self, line: bytes) -> None:
        """Writes the final form of a line: a live line is rewritten after carriage returns."""
        plain = ESCAPES.sub(b"", line).rstrip(b"\r").rpartition(b"\r")[2]
        self.tail.append(plain.decode(errors="replace"))
        if self._log is not None:
            with suppress(OSError):  # a full disk must not end the run here
                self._log.write(plain + b"\n")


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            time.sleep(0.01)


class WorkerProcess:
    """The worker process and the loop that serves it."""

    def __init__(self, command: list[str], link: SupervisorConnection, output: OutputLog) -> None:
        self._link, self._output = link, output
        shown = dict(zip((0, 1, 2), link.terminal, strict=False))
        if not shown and link.rank == 0 and (link.socket is None or link.socket.family != socket.AF_UNIX):
            shown = {0: 0, 1: 1, 2: 2}
        self.process = subprocess.Popen(
            command,
            stdin=shown.get(0, subprocess.DEVNULL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=die_with_parent,  # noqa: PLW1509 (no thread runs here)
            process_group=0,  # so that children of the worker can be killed with it
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self._outputs = {self.process.stdout.fileno(): shown.get(1), self.process.stderr.fileno(): shown.get(2)}
        signal.signal(PARENT_GONE, self._abandon)
        link.send(pid=self.process.pid)

    def serve(self) -> int:
        """Relays until the worker has ended; returns the exit code of a shell."""
        with selectors.DefaultSelector() as selector:
            wake, wake_end = socket.socketpair()
            wake.setblocking(False)
            wake_end.setblocking(False)
            signal.set_wakeup_fd(wake_end.fileno(), warn_on_full_buffer=False)
            selector.register(wake, selectors.EVENT_READ)
            if self._link.socket is not None:
                selector.register(self._link.socket, selectors.EVENT_READ)
            for descriptor in self._outputs:
                selector.register(descriptor, selectors.EVENT_READ)
            deadline: float | None = None
            while deadline is None or (self._outputs and time.monotonic() < deadline):
                for selected, _ in selector.select(1.0 if deadline is None else 0.05):
                    self._handle(selected.fileobj, wake, selector)
                if deadline is None and self.process.poll() is not None:
                    deadline = time.monotonic() + DRAIN_SECONDS
        self._output.finish()
        self._kill_group()
        return shell_code(self.process.returncode)

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _abandon(self, _number: int, _frame: object) -> None:
        """Handles the end of the launcher in the signal handler, since the loop may block on the terminal."""
        self._kill_group()
        os._exit(shell_code(-signal.SIGKILL))

    def _handle(self, source: Any, wake: socket.socket, selector: selectors.BaseSelector) -> None:
        if source is wake:
            with suppress(BlockingIOError):
                wake.recv(CHUNK)
        elif isinstance(source, socket.socket):
            commands = self._link.commands()
            if commands is None:
                selector.unregister(source)
                self.process.kill()
            for command in commands or []:
                with suppress(ProcessLookupError):
                    self.process.send_signal(command["signal"])
        else:
            data = os.read(source, CHUNK)
            if data:
                self._output.write(data, source, self._outputs[source])
            else:
                selector.unregister(source)
                del self._outputs[source]


def _ignore_signal(_signal: int, _frame: object) -> None:
    """Ignores signals of DeepSpeed's launcher to its process tree; the worker handles them."""


def main(arguments: list[str]) -> int:
    """Runs SCRIPT as the worker of this rank."""
    die_with_parent(PARENT_GONE)
    ignore_lost_output()
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(each, _ignore_signal)
    rest = list(arguments)
    folder: Path | None = None
    if rest and rest[0] == "--log-dir":
        folder = Path(rest[1])
        del rest[:2]
    while rest and "=" in rest[0]:
        name, _, value = rest.pop(0).partition("=")
        os.environ[name] = value
    if os.environ.pop(SAFE_PATH_OF_AGENT, None):  # of a worker the script's own folder comes first, as everywhere
        os.environ.pop(SAFE_PATH, None)
    try:
        set_rank_env(os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    rank = Ranks.from_environment().rank
    link = SupervisorConnection(rank, os.environ.pop(SOCKET_VARIABLE, None))
    output = OutputLog(None if folder is None else folder / f"rank_{rank}.log")
    code = WorkerProcess([sys.executable, "-u", *rest], link, output).serve()
    tail = list(output.tail)
    link.send(code=code, tail=tail)
    if code != 0 and link.socket is None and rank != 0:
        print(f"rank {rank} failed with exit code {code}; its last lines:", *tail, sep="\n  ", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
