"""A run whose output has no reader any more goes on, saves at a stop signal and gives its own exit code.

The reader is gone after `| tee` was interrupted, `| head` has ended or a terminal was closed.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.launcher.worker import worker_main
from tests.launcher.conftest import Deepy, Started
from tests.launcher.test_supervisor import STOPS

ENDS: dict[str, tuple[str, signal.Signals | None, int]] = {
    "stopped": (STOPS.replace("SAVING", "0.2"), signal.SIGTERM, 0),
    "interrupted": (STOPS.replace("SAVING", "0.2"), signal.SIGINT, 0),
    "failed": ("open('gone', 'w').write('yes\\n'); time.sleep(0.5); sys.exit(3)", None, 3),
}
"""What the workers do, the signal that deepy.py gets once there is no reader, and its exit code."""


def leave(started: Started) -> None:
    """Ends the reader of both streams."""
    for stream in (started.process.stdout, started.process.stderr):
        assert stream is not None
        stream.close()


@pytest.mark.parametrize("ending", ENDS)
def test_a_run_without_a_reader_ends_as_one_with_a_reader(ending: str, deepy: Deepy) -> None:
    body, number, code = ENDS[ending]
    started = deepy.start(body)
    leave(started)
    if number is not None:
        started.wait_for("ready.0", "ready.1")
        started.process.send_signal(number)
    assert started.process.wait(30) == code
    if number is not None:
        assert [(deepy.folder / f"saved.{rank}").read_text() for rank in (0, 1)] == [f"{int(number)}\n"] * 2


def test_it_restarts_without_a_reader(deepy: Deepy) -> None:
    started = deepy.start(
        """
        if rank == 0:
            with open("attempts", "a") as file:
                file.write("one\\n")
            sys.exit(3 if len(open("attempts").readlines()) == 1 else 0)
        """,
        "--max-restarts",
        "1",
    )
    leave(started)
    assert started.process.wait(30) == 0
    assert (deepy.folder / "attempts").read_text() == "one\none\n"


def hear_hangups() -> None:
    """Undoes nohup, under which the tests may run."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_closed_terminal_saves(deepy: Deepy) -> None:
    deepy.script(STOPS.replace("SAVING", "0.2"))
    ours, theirs = pty.openpty()
    command = [sys.executable, str(Path(__file__).parents[2] / "deepy.py"), "work.py", "conf.yml"]
    process = subprocess.Popen(
        command,
        cwd=deepy.folder,
        env=deepy.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=hear_hangups,  # noqa: PLW1509 (no thread runs here)
        text=True,
    )
    os.close(theirs)
    Started(process, deepy.folder).wait_for("ready.0", "ready.1")
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0
    assert (deepy.folder / "saved.1").read_text() == "15\n"


def test_ranks_on_other_hosts_go_on(flux: Deepy) -> None:
    """Their launcher never writes to the streams that are gone; what it writes is dropped."""
    started = flux.start(STOPS.replace("SAVING", "0.5); print('x' * 100000, flush=True); time.sleep(0.2"))
    leave(started)
    started.wait_for("ready.0", "ready.1")
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(30) == 0
    assert (flux.folder / "saved.1").read_text() == "15\n"


WORKER = """
import sys, time
from megatron.launcher import worker
worker.worker_config = lambda given: None
def main(config):
    sys.stdin.read()  # until the reader is gone
    print("a line")
    print("an error", file=sys.stderr, flush=True)
    print("more" * 10000, flush=True)
    open("done", "w").close()
sys.exit(worker.worker_main(main, []))
"""


@pytest.mark.parametrize("options", [[], ["-u"]])
def test_a_worker_alone_goes_on(options: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, *options, "-c", WORKER],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for stream in (process.stdout, process.stderr, process.stdin):
        assert stream is not None
        stream.close()
    assert process.wait(30) == 0
    assert (tmp_path / "done").exists()


def test_a_full_disk_does_not_end_a_worker(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", WORKER],
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=full,
            timeout=30,
        )
    assert ended.returncode == 0
    assert (tmp_path / "done").exists()


def test_replaced_streams_stay(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert worker_main(lambda config: None, ["--run-config", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def printing(what: str, redirected: str = "", **variables: str) -> subprocess.CompletedProcess[bytes]:
    """A program with a run's output streams that prints something, in a shell with that redirection."""
    code = (
        "import sys; from megatron.output_streams import ignore_lost_output, open_missing_output;"
        f"open_missing_output(); ignore_lost_output(); print({what!a}); print(sys.stdout.isatty(), file=sys.stderr)"
    )
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirected}', sys.executable, code]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, check=False)


def test_characters_that_the_output_cannot_have_are_escaped() -> None:
    found = printing("a → é", PYTHONIOENCODING="latin-1")
    assert (found.returncode, found.stdout) == (0, b"a \\u2192 \xe9\n")
    assert printing("a → é", PYTHONIOENCODING="utf-8").stdout == "a → é\n".encode()
    locale = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    found = printing("a → é", **locale, PYTHONIOENCODING="")
    assert (found.returncode, found.stdout) == (0, b"a \\u2192 \\xe9\n")
    assert printing("a → é", PYTHONIOENCODING="ascii:replace").stdout == b"a ? ?\n", "what the user asks for stays"


@pytest.mark.parametrize(("redirected", "error"), [(">&-", b"False\n"), (">&- 2>&-", b""), ("2>&-", b"")])
def test_closed_descriptors_are_the_null_device(redirected: str, error: bytes) -> None:
    found = printing("anything", redirected)
    assert (found.returncode, found.stderr) == (0, error)
