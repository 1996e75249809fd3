"""The watch over a run: when a rank dies, hangs or fails, the others say which one, where it stood and in what.

A run of one rank is watched too, since reading data can hang. What is found goes to `failures/` in the run directory:
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


class Watch:
    """The watch of one rank.

    folder: the run directory, None to write nothing. limit [s]: the key collective_timeout.
    """

    def __init__(self, topology: Topology, folder: Path | None, limit: float) -> None:
        self._world_size, self._rank = topology.world_size, topology.rank
        self._folder, self._limit = folder, limit
        self._heart = Heartbeat(rank=topology.rank, stage=topology.pipe.rank, limit=limit, hanging=self._leave)

    @contextmanager
    def over(self) -> Iterator[None]:
        """Watches the enclosed run. A failed collective becomes a RunError that names the rank which did not come."""
        self._heart.start()
        try:
            yield
        except (ConfigError, RunError):
            raise
        except Exception as error:
            if self._world_size == 1 or not failed_in_a_collective(error):
                self._write(f"failed: {error!r}")
                raise
            told = self._explain(error)
            self._write("\n".join(str(issue) for issue in told.issues))
            raise told from error
        finally:
            self._heart.stop()

    def doing(self, what: str, iteration: int | None = None) -> AbstractContextManager[None]:
        """Says what the enclosed work is."""
        return self._heart.doing(what, iteration)

    def _explain(self, error: Exception) -> RunError:
        mine = self._heart.now()
        with self._heart.doing("failing"):
            time.sleep(STALE)  # a rank that is gone must have grown silent
        pulses = self._heart.everyone(self._world_size)
        found = likely_culprits(pulses, self._world_size, time.time()) if pulses else [_unreachable(mine)]
        blamed = "; ".join(found) or "no rank stands out: the network between them may be cut"
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return RunError.of(
            f"a collective failed{mine.when} ({mine.doing}): {first_line}. Waited for: {blamed}",
            location=f"stage {mine.stage}",
            hint=f"see {FAILURES}/ and rank_N.log in the run directory; a wait may last collective_timeout "
            f"= {self._limit:g} s",
        )

    def _leave(self, pulse: HeartbeatRecord) -> None:
        """The main thread hangs, so this thread ends the process."""
        told = f"{pulse}; nothing moved for that long, and collective_timeout is {self._limit:g} s"
        self._write(told)
        print(told, file=sys.stderr, flush=True)
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
    return f"nothing is heard from {first}, where the ranks met: it is gone, or this host ({mine.host}) is cut off"
