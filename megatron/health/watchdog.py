"""Watchdog: names the rank that died or hung, with its stack and collective.

A run of one rank is watched too, since reading data can hang. Reports are written to `failures/` in the run directory:
`rank_N.txt` with the stacks of all threads, and `rank_N.json` with the last collectives (torchfrtrace reads it).
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from megatron.distributed.mesh import Topology
from megatron.distributed.timeouts import failed_in_a_collective, flight_record
from megatron.errors import ConfigError, RunError
from megatron.health.heartbeat import STALE, Heartbeat, HeartbeatRecord, likely_culprits

FAILURES = "failures"


class Watchdog:
    """The watchdog of one rank."""

    def __init__(self, topology: Topology, folder: Path | None, limit: float) -> None:
        """Prepares the heartbeat. folder: the run directory; None to write nothing. limit: collective_timeout [s]."""
        self._world_size, self._rank = topology.world_size, topology.rank
        self._folder, self._limit = folder, limit
        self._heartbeat = Heartbeat(rank=topology.rank, stage=topology.pipe.rank, limit=limit, on_hang=self._exit_hung)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Watches the enclosed run. A failed collective becomes a RunError that names the missing rank."""
        self._heartbeat.start()
        try:
            yield
        except (ConfigError, RunError):
            raise
        except Exception as error:
            if self._world_size == 1 or not failed_in_a_collective(error):
                self._write(f"failed: {error!r}")
                raise
            explained = self._explain(error)
            self._write("\n".join(str(issue) for issue in explained.issues))
            raise explained from error
        finally:
            self._heartbeat.stop()

    def activity(self, what: str, iteration: int | None = None) -> AbstractContextManager[None]:
        """Sets the activity of the enclosed work."""
        return self._heartbeat.activity(what, iteration)

    def _explain(self, error: Exception) -> RunError:
        mine = self._heartbeat.current()
        with self._heartbeat.activity("failing"):
            time.sleep(STALE)  # until the record of a dead rank is old
        records = self._heartbeat.read_all(self._world_size)
        found = likely_culprits(records, self._world_size, time.time()) if records else [_unreachable(mine)]
        culprits = "; ".join(found) or "no rank stands out: the network between them may be cut"
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return RunError.of(
            f"a collective failed{mine.when} ({mine.activity}): {first_line}. Waited for: {culprits}",
            location=f"stage {mine.stage}",
            hint=f"see {FAILURES}/ and rank_N.log in the run directory; a wait may last collective_timeout "
            f"= {self._limit:g} s",
        )

    def _exit_hung(self, record: HeartbeatRecord) -> None:
        """Ends the process from the heartbeat thread, since the main thread hangs."""
        explained = f"{record}; nothing moved for that long, and collective_timeout is {self._limit:g} s"
        self._write(explained)
        print(explained, file=sys.stderr, flush=True)
        os._exit(RunError.exit_code)

    def _write(self, text: str) -> None:
        if self._folder is None:
            return
        folder = self._folder / FAILURES
        with suppress(OSError):  # a full disk must not hide the reason
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank_{self._rank}.json").write_text(flight_record())
            with (folder / f"rank_{self._rank}.txt").open("w") as file:
                print(text, file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)


def _unreachable(mine: HeartbeatRecord) -> str:
    first = os.environ.get("MASTER_ADDR", "rank 0's host")
    return f"no reply from {first}, the host of rank 0: it is down, or this host ({mine.host}) is disconnected"
