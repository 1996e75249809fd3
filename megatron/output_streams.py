"""Standard output and error of a run that goes on when they have no reader any more.

Lines are lost when `tee` was interrupted, a terminal was closed or a disk is full. By default the write raises, and
the run would end there without the checkpoint that its stop signal requests. The same holds for characters that the
encoding of the output does not have: they are written as escapes.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from megatron.errors import RunError

_CHUNK = 1 << 16
_RAISES = ("strict", "surrogateescape")
"""What Python does about characters that an encoding lacks, and what it does in the C locale: both raise."""


class _LossyFile(io.FileIO):
    """A descriptor that drops what cannot be written."""

    def write(self, data: Any, /) -> int:
        """Returns the number of bytes that were written or dropped."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def open_missing_output() -> None:
    """Opens the null device as standard output or error where the caller has closed them."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_WRONLY)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False)), "utf-8"))


def ignore_lost_output() -> None:
    """Replaces sys.stdout and sys.stderr by streams that drop lines which cannot be written.

    Streams that something else has put in their place are left as they are.
    """
    sys.stdout = _lossy(sys.stdout, sys.__stdout__)
    sys.stderr = _lossy(sys.stderr, sys.__stderr__)


def escape_characters() -> None:
    """Lets sys.stdout and sys.stderr write characters that their encoding lacks as escapes, and opens closed ones.

    For programs that end with their output; `ignore_lost_output` does the first too.
    """
    open_missing_output()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in _RAISES:
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Sends what standard output would still write, at exit too, to nowhere: its reader has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_tool(main: Callable[[], int]) -> int:
    """Runs the main function of a tool and returns its exit code; a file that fails it is named in one line.

    A reader that has closed the pipe ends the tool without a word.
    """
    escape_characters()
    try:
        return main()
    except BrokenPipeError:
        discard_output()
        return 0
    except OSError as error:
        what = f"cannot be read or written: {error.strerror or error}"
        print(RunError.of(what, location=str(error.filename or "")), file=sys.stderr)
        return RunError.exit_code


def copy_output(source: int, target: int) -> None:
    """Copies bytes from one descriptor to another until the source ends; drops those that cannot be written."""
    with _LossyFile(target, "w", closefd=False) as file:
        while data := os.read(source, _CHUNK):
            while data:
                data = data[file.write(data) :]


def _lossy(stream: Any, original: TextIO | None) -> Any:
    if stream is not original or type(stream) is not io.TextIOWrapper:
        return stream
    with suppress(OSError):
        stream.flush()
    file = _LossyFile(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),  # type: ignore[type-var]  # as python -u does
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors in _RAISES else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
