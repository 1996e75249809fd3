"""Stages: commands that run in order, each once.

A stage is finished when its stamp has the digest of the same command, the same input files and the same earlier stages,
and its results exist. So an interrupted run continues, and a change repeats only the stages that depend on it.
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
    """One command."""

    name: str
    """One word."""
    description: str
    """One line for the user."""
    command: tuple[str, ...]
    """Program and arguments."""
    results: tuple[Path, ...]
    """Files or folders that it creates."""
    reads: tuple[Path, ...] = ()
    """Files whose content it depends on."""
    after: tuple[str, ...] = ()
    """Stages whose results it uses."""
    output_file: Path | None = None
    """File that also gets the command's output."""
    resume: Callable[[], Sequence[str]] = field(default=tuple)
    """Returns further arguments that resume an interrupted run."""
    clean_up: Callable[[], None] | None = None
    """Removes results of a different version of this stage, before it starts."""


class Stamps:
    """Stamps of finished stages, one small file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def digest(self, stage: Stage, before: Mapping[str, str]) -> str:
        """Returns a digest of the command, the content of its input files and the earlier stages."""
        digest = hashlib.sha256()
        digest.update(json.dumps([stage.command, [before[name] for name in stage.after]]).encode())
        for path in stage.reads:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def read(self, stage: Stage) -> dict[str, object]:
        """Reads the stamp: `digest`, and `seconds` once it has finished; {} without one."""
        try:
            record = json.loads((self.folder / f"{stage.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def write(self, stage: Stage, digest: str, seconds: float | None) -> None:
        record = {"digest": digest} if seconds is None else {"digest": digest, "seconds": round(seconds, 1)}
        write_atomic(self.folder / f"{stage.name}.json", json.dumps(record))


def run_stages(
    stages: Sequence[Stage], stamps: Stamps, log: Callable[[str], None], environment: Mapping[str, str]
) -> dict[str, float]:
    """Runs the stages that are not finished; returns the seconds of each stage.

    Raises RunError when a command fails, and KeyboardInterrupt when it was interrupted; finished stages stay finished.

    Args:
        stages: in order.
        stamps: of finished stages.
        log: prints a line.
        environment: of the commands.
    """
    digests: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for number, stage in enumerate(stages, 1):
        digests[stage.name] = stamps.digest(stage, digests)
        record = stamps.read(stage)
        title = f"[{number}/{len(stages)}] {stage.name}: {stage.description}"
        same = record.get("digest") == digests[stage.name]
        took = record.get("seconds")
        if same and isinstance(took, float | int) and all(path.exists() for path in stage.results):
            log(f"{title}\n      done before, in {took:.0f} s")
            seconds[stage.name] = float(took)
            continue
        if record and not same and stage.clean_up is not None:
            stage.clean_up()
        stamps.write(stage, digests[stage.name], None)
        command = [*stage.command, *stage.resume()]
        log(f"{title}\n      {shlex.join(command)}")
        started = time.monotonic()
        run_command(command, environment, stage.output_file)
        missing = [str(path) for path in stage.results if not path.exists()]
        if missing:
            raise RunError.of(f"{stage.name} ended well but left no {', '.join(missing)}")
        seconds[stage.name] = time.monotonic() - started
        stamps.write(stage, digests[stage.name], seconds[stage.name])
        log(f"      {seconds[stage.name]:.0f} s")
    return seconds


def run_command(command: Sequence[str], environment: Mapping[str, str], output_file: Path | None = None) -> None:
    """Runs a command to its end, and forwards SIGTERM to it.

    Ctrl-C reaches the command directly, since it is on the same terminal. Raises RunError for a failure and
    KeyboardInterrupt when a signal ended the command.

    command: program and arguments. environment: all variables. output_file: also gets the command's standard output.
    """
    process = subprocess.Popen(
        command, env=dict(environment), stdout=subprocess.PIPE if output_file else None, text=True
    )
    stopped: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)
        if number != signal.SIGINT:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        lines = []
        for line in process.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise KeyboardInterrupt
    if code != 0:
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise RunError.of(f"{shlex.join(command)} failed with {ended}", hint="its output is above")
    if output_file is not None:
        output_file.parent.mkdir(parents=True, exist_ok=True)
        output_file.write_text("".join(lines), encoding="utf-8")
