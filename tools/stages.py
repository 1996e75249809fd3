"""Stages: commands that run one after another, each once.

A stage is done when a stamp says that this very stage ended well: the same command, the same files read, the same
stages before it, and its results still there. A run that was interrupted so goes on where it stopped, and a change
makes again what depends on it and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from megatron.atomic import write_atomic
from megatron.errors import RunError


@dataclass(frozen=True)
class Stage:
    """One step of the way.

    name: one word. does: what it does, for the reader. command: what to run. results: files or folders that it leaves.
    reads: files whose content it depends on. after: the stages whose results it uses. answer: keep what the command
    prints in this file as well. resume: further arguments that depend on what an interrupted run left. forget: removes
    what an earlier, different version of this stage left, called before it starts anew.
    """

    name: str
    does: str
    command: tuple[str, ...]
    results: tuple[Path, ...]
    reads: tuple[Path, ...] = ()
    after: tuple[str, ...] = ()
    answer: Path | None = None
    resume: Callable[[], Sequence[str]] = field(default=tuple)
    forget: Callable[[], None] | None = None


class Stamps:
    """What is done, kept as one small file a stage in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def digest(self, stage: Stage, before: Mapping[str, str]) -> str:
        """Changes with the command, with the content of what it reads and with the stages before."""
        told = hashlib.sha256()
        told.update(json.dumps([stage.command, [before[name] for name in stage.after]]).encode())
        for path in stage.reads:
            told.update(path.read_bytes())
        return told.hexdigest()

    def read(self, stage: Stage) -> dict[str, object]:
        """What is known of the stage: `digest`, and `seconds` once it has ended; empty when nothing is."""
        try:
            record = json.loads((self.folder / f"{stage.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def write(self, stage: Stage, digest: str, seconds: float | None) -> None:
        record = {"digest": digest} if seconds is None else {"digest": digest, "seconds": round(seconds, 1)}
        write_atomic(self.folder / f"{stage.name}.json", json.dumps(record))


def run_stages(
    stages: Sequence[Stage], stamps: Stamps, say: Callable[[str], None], environment: Mapping[str, str]
) -> dict[str, float]:
    """Runs what is not done yet; returns how long each stage took when it ran [s].

    Raises RunError when a command fails, and KeyboardInterrupt when it was interrupted; what was done stays done.
    """
    digests: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for number, stage in enumerate(stages, 1):
        digests[stage.name] = stamps.digest(stage, digests)
        record = stamps.read(stage)
        title = f"[{number}/{len(stages)}] {stage.name}: {stage.does}"
        same = record.get("digest") == digests[stage.name]
        took = record.get("seconds")
        if same and isinstance(took, float | int) and all(path.exists() for path in stage.results):
            say(f"{title}\n      done before, in {took:.0f} s")
            seconds[stage.name] = float(took)
            continue
        if record and not same and stage.forget is not None:
            stage.forget()
        stamps.write(stage, digests[stage.name], None)
        command = [*stage.command, *stage.resume()]
        say(f"{title}\n      {shlex.join(command)}")
        started = time.monotonic()
        run_command(command, environment, stage.answer)
        missing = [str(path) for path in stage.results if not path.exists()]
        if missing:
            raise RunError.of(f"{stage.name} ended well but left no {', '.join(missing)}")
        seconds[stage.name] = time.monotonic() - started
        stamps.write(stage, digests[stage.name], seconds[stage.name])
        say(f"      {seconds[stage.name]:.0f} s")
    return seconds


def run_command(command: Sequence[str], environment: Mapping[str, str], answer: Path | None = None) -> None:
    """Runs a command to its end, and passes SIGTERM on to it.

    A Ctrl-C reaches the command by itself, since it belongs to the same terminal; here it is waited for. answer: a file
    that gets the command's standard output, which is shown all the same. Raises RunError for a failure and
    KeyboardInterrupt when a signal ended the command.
    """
    process = subprocess.Popen(command, env=dict(environment), stdout=subprocess.PIPE if answer else None, text=True)
    stopped: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)
        if number != signal.SIGINT:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        told = []
        for line in process.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            told.append(line)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise KeyboardInterrupt
    if code != 0:
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise RunError.of(f"{shlex.join(command)} failed with {ended}", hint="its own words stand above")
    if answer is not None:
        answer.parent.mkdir(parents=True, exist_ok=True)
        answer.write_text("".join(told), encoding="utf-8")
