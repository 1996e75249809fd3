"""Runs the launcher, forwards signals, returns one exit code and leaves no orphan processes.

The launcher runs in a session of its own, so that Ctrl-C on the terminal reaches this process alone. Each rank's
`megatron.launcher.rank_agent` connects to a socket here. A stop signal is forwarded to the workers only, which save
and exit with 0. When a worker fails, the others have GRACE_SECONDS to notice and are then killed; the exit code and the
last lines of the first failed rank are reported. This process watches the ranks and not the launcher, which exits 0
when a signal killed a worker and otherwise takes seconds to notice that all have ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.launcher.rank_agent import CHUNK, NETWORK, SOCKET_VARIABLE, die_with_parent, shell_code
from megatron.output_streams import copy_output

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
CONFIG_ERROR_CODE = 2  # a ConfigError's exit code
GRACE_SECONDS = 3.0  # from the first failure until the other workers are killed
END_SECONDS = 5.0  # until killed workers have ended
LONGEST_SOCKET_FOLDER = 80  # [bytes], since the address of a socket has at most 107 (unix(7))


@dataclass
class Rank:
    """State of one rank."""

    rank: int
    """Its number."""
    link: socket.socket | None
    """The connection to its agent; None once it is closed."""
    pid: int | None = None
    """Process id of the worker."""
    code: int | None = None
    """Exit code of the worker, once it has ended."""
    tail: list[str] = field(default_factory=list)
    """Last lines of its output."""
    host: str | None = None
    """Its host, if it is another one."""


@dataclass(frozen=True)
class Outcome:
    """Result of a launch."""

    code: int
    """Exit code."""
    failed: int | None = None
    """The rank that failed first; None if none did."""
    tail: tuple[str, ...] = ()
    """Last lines of that rank."""
    stopped_by: signal.Signals | None = None
    """The signal that stopped the run."""
    host: str | None = None
    """Host of the failed rank, if it is another one."""


def terminal_environment() -> dict[str, str]:
    """Returns variables that describe the terminal to rank 0, whose stdout is a pipe."""
    if not sys.stdout.isatty():
        return {}
    return {"NEOX_TTY": "1", "COLUMNS": str(shutil.get_terminal_size((120, 24)).columns)}


@dataclass
class Network:
    """Listener for ranks on other hosts."""

    listener: socket.socket
    """The listening socket."""
    token: str
    """Secret that a rank must send first."""

    @classmethod
    def open(cls) -> Network:
        """Listens on a free port of every address of this host."""
        listener = socket.create_server(("", 0), backlog=4096)
        return cls(listener, secrets.token_hex(16))

    def address(self, host: str) -> str:
        """Returns the address for ranks, with a name or IP address of this host."""
        return f"{NETWORK}{host}:{self.listener.getsockname()[1]}/{self.token}"


class Supervisor:
    """Supervises one launch."""

    def __init__(self, world_size: int, *, interrupts_answers: bool = False, network: Network | None = None) -> None:
        self._world_size = world_size
        self._interrupts_answers = interrupts_answers
        self._network = network
        self._ranks: dict[int, Rank] = {}
        self._first: Rank | None = None  # that failed
        self._stop: signal.Signals | None = None
        self._kill_at: float | None = None
        self._selector = selectors.DefaultSelector()
        self._pending: dict[socket.socket, bytes] = {}

    def run(self, command: Sequence[str], environment: Mapping[str, str], launcher_log: Path) -> Outcome:
        """Starts the launcher and returns when every rank has ended.

        environment: the full environment of the launcher. launcher_log: file of its output.
        """
        with ExitStack() as cleanup:
            cleanup.enter_context(self._selector)
            full_environment = {**environment, **self._listen(cleanup)}
            self._watch_signals(cleanup)
            log = cleanup.enter_context(launcher_log.open("ab"))
            start_of_output = log.tell()
            launcher = subprocess.Popen(
                list(command),
                env=full_environment,
                stdin=subprocess.DEVNULL,
                stdout=log if self._network is None else subprocess.PIPE,
                stderr=log if self._network is None else subprocess.PIPE,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 (no thread runs here)
            )
            ctypes.CDLL(None).prctl(
                PR_SET_CHILD_SUBREAPER, 1
            )  # whoever loses its parent becomes a child of this process
            _show_output(launcher, cleanup)
            cleanup.callback(_end_all, launcher)
            self._serve(launcher)
            if self._network is not None:
                self._disconnect_ranks(launcher)
            return self._outcome(launcher, launcher_log, start_of_output)

    def _listen(self, cleanup: ExitStack) -> dict[str, str]:
        """Opens the socket for ranks; returns the variable with its address for ranks of this host."""
        if self._network is not None:
            listener, found = cleanup.enter_context(self._network.listener), {}
        else:
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="neox-", dir=_socket_folder()))
            address = os.path.join(folder, "supervisor")
            listener, found = cleanup.enter_context(socket.socket(socket.AF_UNIX)), {SOCKET_VARIABLE: address}
            listener.bind(address)
            listener.listen(self._world_size)
        self._selector.register(listener, selectors.EVENT_READ, self._on_connect)
        return found

    def _disconnect_ranks(self, launcher: subprocess.Popen[bytes]) -> None:
        """Ends ranks on other hosts by closing their connections; then signals the launcher if it does not end."""
        for link in list(self._pending):
            link.close()
        for signal_to_send in (None, signal.SIGINT, signal.SIGTERM):
            if signal_to_send is not None:
                launcher.send_signal(signal_to_send)
            with suppress(subprocess.TimeoutExpired):
                launcher.wait(END_SECONDS)
                return

    def _watch_signals(self, cleanup: ExitStack) -> None:
        """Wakes the loop by signals; the handlers do nothing. An ignored SIGHUP (nohup) stays ignored."""
        wake, wake_end = socket.socketpair()
        cleanup.callback(wake.close)
        cleanup.callback(wake_end.close)
        wake.setblocking(False)
        wake_end.setblocking(False)
        cleanup.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(wake_end.fileno(), warn_on_full_buffer=False))
        for each in (*STOP_SIGNALS, signal.SIGCHLD):
            before = signal.getsignal(each)
            if each == signal.SIGHUP and before == signal.SIG_IGN:
                continue
            signal.signal(each, lambda _number, _frame: None)
            cleanup.callback(signal.signal, each, before)
        self._selector.register(wake, selectors.EVENT_READ, self._on_signal)

    def _serve(self, launcher: subprocess.Popen[bytes]) -> None:
        launcher_gone_at: float | None = None
        while not self._finished():
            for key, _ in self._selector.select(0.2 if self._kill_at or launcher_gone_at else 5.0):
                key.data(key.fileobj)
            now = time.monotonic()
            if self._kill_at is not None and now >= self._kill_at:
                return
            if launcher.poll() is not None:
                launcher_gone_at = launcher_gone_at or now
                if now - launcher_gone_at > 1.0:  # the last reports have had time to arrive
                    return

    def _finished(self) -> bool:
        return len(self._ranks) == self._world_size and all(each.code is not None for each in self._ranks.values())

    def _on_connect(self, listener: Any) -> None:
        link, _ = listener.accept()
        self._pending[link] = b""
        self._selector.register(link, selectors.EVENT_READ, self._on_readable)

    def _on_readable(self, link: Any) -> None:
        """Reads messages of a rank; a connection that closes before the exit code means that it was killed."""
        try:
            received = link.recv(CHUNK)
        except OSError:
            received = b""
        if not received:
            self._selector.unregister(link)
            link.close()
            for each in self._ranks.values():
                if each.link is link:
                    each.link = None
                    if each.code is None:
                        self._on_exit(each, shell_code(-signal.SIGKILL), [])
            return
        *lines, self._pending[link] = (self._pending[link] + received).split(b"\n")
        for line in lines:
            message = self._parse_message(link, line)
            if message is None:  # no rank of this launch
                self._selector.unregister(link)
                link.close()
                return
            self._on_message(link, message)

    def _parse_message(self, link: socket.socket, line: bytes) -> dict[str, Any] | None:
        """Parses a message; over the network, a rank must have sent the token first."""
        known = self._network is None or any(each.link is link for each in self._ranks.values())
        try:
            message: dict[str, Any] = json.loads(line)
            shown = known or (self._network is not None and message.get("token") == self._network.token)
            return message if shown and isinstance(message.get("rank"), int) else None
        except (ValueError, AttributeError):
            return None

    def _on_message(self, link: socket.socket, message: dict[str, Any]) -> None:
        number = message["rank"]
        if number not in self._ranks:
            self._ranks[number] = Rank(number, link, host=message.get("host"))
            if self._network is None:
                with suppress(OSError):
                    socket.send_fds(link, [b"."], [0, 1, 2] if number == 0 else [])
            if self._stop is not None:
                self._send(self._ranks[number], self._stop)
        each = self._ranks[number]
        each.pid = message.get("pid", each.pid)
        if "code" in message:
            self._on_exit(each, message["code"], message["tail"])

    def _on_exit(self, each: Rank, code: int, tail: list[str]) -> None:
        each.code, each.tail = code, tail
        if code != 0 and self._first is None:
            self._first = each
            self._kill_at = time.monotonic() + GRACE_SECONDS

    def _on_signal(self, wake: Any) -> None:
        try:
            numbers = wake.recv(CHUNK)
        except BlockingIOError:
            return
        for number in numbers:
            if number == signal.SIGCHLD:
                continue
            if number == signal.SIGINT and self._interrupts_answers and self._ranks:
                for each in self._ranks.values():
                    self._send(each, signal.SIGINT)
                continue
            if number == signal.SIGINT and self._stop == signal.SIGINT:
                self._kill_at = time.monotonic()
                return
            self._stop = signal.Signals(number)
            if not self._ranks:
                self._kill_at = time.monotonic()  # no worker runs yet, so there is nothing to save
                return
            for each in self._ranks.values():
                self._send(each, self._stop)
            again = "; once more ends them without saving" if number == signal.SIGINT else ""
            below = "\n" if sys.stderr.isatty() else ""  # the live line of rank 0 is there
            _print(f"{below}{self._stop.name}: the workers save and stop, or end if training has not begun{again}")

    def _send(self, each: Rank, number: signal.Signals) -> None:
        if each.link is not None and each.code is None:
            # A worker handles three stop signals; a closed terminal is sent as SIGTERM.
            order = signal.SIGTERM if number == signal.SIGHUP else number
            with suppress(OSError):
                each.link.sendall(json.dumps({"signal": int(order)}).encode() + b"\n")

    def _outcome(self, launcher: subprocess.Popen[bytes], log: Path, start: int) -> Outcome:
        if self._first is not None:
            assert self._first.code is not None
            return Outcome(
                self._first.code, self._first.rank, tuple(self._first.tail), self._stop, host=self._first.host
            )
        unseen = self._network is not None and launcher.poll() == 0  # some may not have been able to connect
        if self._finished() or (unseen and all(each.code == 0 for each in self._ranks.values())):
            return Outcome(0, stopped_by=self._stop)
        if self._stop is not None:
            return Outcome(shell_code(-self._stop), stopped_by=self._stop)
        lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
        return Outcome(shell_code(launcher.poll() or 1), tail=tuple(lines[-40:]))


def _socket_folder() -> str:
    """The folder of temporary files, or /tmp where the address of a socket in the former would be too long."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= LONGEST_SOCKET_FOLDER else "/tmp"


def _show_output(launcher: subprocess.Popen[bytes], cleanup: ExitStack) -> None:
    """Copies the output of a launcher of several hosts, which a closed pipe or terminal of its own would end."""
    for stream, target in ((launcher.stdout, 1), (launcher.stderr, 2)):
        if stream is not None:
            copying = threading.Thread(target=copy_output, args=(stream.fileno(), target), daemon=True)
            copying.start()
            cleanup.callback(stream.close)
            cleanup.callback(copying.join, END_SECONDS)


def _end_all(launcher: subprocess.Popen[bytes]) -> None:
    """Ends the launcher and all processes that it started.

    Its ranks share its process group, each worker dies with its agent, and orphans of a worker become children of this
    process, the nearest subreaper.
    """
    deadline = time.monotonic() + END_SECONDS
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    while (left := _children()) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    children = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            children += [int(pid) for pid in (task / "children").read_text().split()]
    return children


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_outcome(outcome: Outcome) -> None:
    """Prints why a launch failed, after the last lines of the failed rank."""
    if outcome.code == 0 or (outcome.code == CONFIG_ERROR_CODE and outcome.failed == 0):
        return  # success, or a config error that rank 0 has printed
    if outcome.stopped_by is not None and outcome.code == shell_code(-outcome.stopped_by):
        _print(f"ended by {outcome.stopped_by.name} without saving")
    elif outcome.failed is None:
        _print(
            "\n".join([*outcome.tail, "DeepSpeed's launcher ended before the workers did; its last lines are above"])
        )
    else:
        killed = outcome.code > 128
        how = f"signal {signal.Signals(outcome.code - 128).name}" if killed else f"exit code {outcome.code}"
        lines = [f"[rank {outcome.failed}] {line}" for line in outcome.tail]
        host = f" on {outcome.host}" if outcome.host else ""
        _print("\n".join([*lines, f"rank {outcome.failed}{host} failed first, with {how}; its last lines are above"]))
