"""Heartbeat: each rank publishes its activity to the store once a second.

A thread of each rank writes a small record into the key-value store of the process group. It runs while the main thread
is blocked, so an old record means that the process is dead, frozen or disconnected, and a fresh record whose activity
does not change means that the main thread hangs.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron.distributed.init import host_name
from megatron.distributed.timeouts import (
    collective_in_progress,
    device_collective_in_progress,
    failed_in_a_collective,
    stack_summary,
)

STARTING, SAVING, TASKS, ASKING = "starting", "saving", "evaluating tasks", "asking the model"
UNLIMITED = frozenset({STARTING, SAVING, TASKS, ASKING})
"""Activities without a time limit; collectives in them have one."""
INTERVAL = 1.0  # [s] between two records of a rank
STALE = 4.0  # [s] after which a record is old
HANG_FRACTION = 0.9  # of the limit, after which a rank outside of collectives is reported as hanging


@dataclass(frozen=True)
class HeartbeatRecord:
    """Last record of one rank; times are of the rank's own clock [s since 1970]."""

    rank: int
    """The rank."""
    host: str
    """Its host."""
    stage: int
    """Its pipeline stage."""
    iteration: int
    """Its iteration; 0 before the first."""
    activity: str
    """Its activity, such as "training", "reading data" or "saving"."""
    started_at: float
    """Start of the activity."""
    updated_at: float
    """Time of this record."""
    collective_name: str | None = None
    """The collective in which the main thread waits, if any."""
    stack: str | None = None
    """Stack of the main thread, once it has not changed for some time."""

    @property
    def when(self) -> str:
        """The iteration as a part of a sentence; "" before the first."""
        return f" at iteration {self.iteration}" if self.iteration else ""

    def __str__(self) -> str:
        prefix = f"rank {self.rank} (host {self.host}, stage {self.stage}){self.when}"
        waits = f", waiting for others in {self.collective_name}" if self.collective_name else ""
        stack_text = f", at {self.stack}" if self.stack and not self.collective_name else ""
        return f"{prefix}: {self.activity} for {self.updated_at - self.started_at:.0f} s{waits}{stack_text}"


class Heartbeat:
    """Publishes this rank's record from a thread."""

    def __init__(self, *, rank: int, stage: int, limit: float, on_hang: Callable[[HeartbeatRecord], None]) -> None:
        """Prepares the thread.

        Args:
            rank: of this process.
            stage: its pipeline stage.
            limit: of an activity [s].
            on_hang: called once, in the thread, when the main thread has had one activity for nearly that long without
                waiting for another rank.
        """
        now = time.time()
        self._record = HeartbeatRecord(rank, host_name(), stage, 0, STARTING, now, now)
        self._limit, self._on_hang = limit, on_hang
        self._main = threading.main_thread().ident or 0
        self._store = _store()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)

    def start(self) -> None:
        """Starts the heartbeat thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stops the heartbeat thread."""
        self._end.set()
        self._thread.join(2 * INTERVAL)

    @contextmanager
    def activity(self, what: str, iteration: int | None = None) -> Iterator[None]:
        """Sets the activity of the enclosed work, and restores the previous one afterwards.

        After a failed collective the activity is not restored, so that other ranks report it.
        """
        before = self._record
        self._record = replace(
            before,
            activity=what,
            started_at=time.time(),
            iteration=before.iteration if iteration is None else iteration,
        )
        failed = False
        try:
            yield
        except Exception as error:
            failed = failed_in_a_collective(error)
            raise
        finally:
            if not failed:
                self._record = replace(self._record, activity=before.activity, started_at=time.time())

    def read_all(self, world_size: int) -> list[HeartbeatRecord]:
        """Reads the records of all ranks; none where the store cannot be reached within STALE [s].

        A disconnected host gets no reply, and the network's own timeout is a quarter of an hour.
        """
        found: list[list[HeartbeatRecord]] = []

        def ask() -> None:
            with suppress(RuntimeError):  # the store ended with its rank
                reported = [_key(rank) for rank in range(world_size) if self._store.check([_key(rank)])]
                found.append([HeartbeatRecord(**json.loads(self._store.get(key))) for key in reported])

        asking = threading.Thread(target=ask, name="heart-asks", daemon=True)
        asking.start()
        asking.join(STALE)
        return found[0] if found else []

    def current(self) -> HeartbeatRecord:
        """Returns this rank's current record."""
        return replace(
            self._record,
            updated_at=time.time(),
            collective_name=collective_in_progress(self._main),
            stack=stack_summary(self._main),
        )

    def _beat(self) -> None:
        reported = False
        while not self._end.is_set():
            record = self.current()
            with suppress(RuntimeError):  # the store may have ended with its rank; this rank is still watched
                self._store.set(_key(record.rank), json.dumps(asdict(record)))
            if not reported and self._is_hanging(record):
                reported = True
                self._on_hang(record)
            self._end.wait(INTERVAL)

    def _is_hanging(self, record: HeartbeatRecord) -> bool:
        long = record.updated_at - record.started_at > HANG_FRACTION * self._limit
        if not long or record.activity in UNLIMITED or record.collective_name is not None:
            return False
        return device_collective_in_progress() is None


def likely_culprits(records: list[HeartbeatRecord], world_size: int, now: float) -> list[str]:
    """Returns a sentence for each rank that the others most likely wait for, the most likely first.

    Ranks without a recent heartbeat come first; else ranks whose main thread is not in a collective; else ranks at an
    earlier iteration. now: [s since 1970]; clocks of hosts may differ by less than STALE.
    """
    silent = [
        f"{record}; no heartbeat for {now - record.updated_at:.0f} s"
        for record in records
        if now - record.updated_at > STALE
    ]
    missing = sorted(set(range(world_size)) - {record.rank for record in records})
    silent += [f"rank {rank} never sent a heartbeat" for rank in missing]
    if silent:
        return silent
    busy = [record for record in records if record.collective_name is None and record.activity != "failing"]
    if busy:
        return [str(record) for record in sorted(busy, key=lambda record: record.started_at)]
    least = min((record.iteration for record in records), default=0)
    return [str(record) for record in records if record.iteration == least < max(each.iteration for each in records)]


def _key(rank: int) -> str:
    return f"neox/pulse/{rank}"


def _store() -> Any:
    """Returns a second connection to the store if possible, since a waiting main thread blocks the first."""
    store: Any = (
        distributed_c10d._get_default_store() if dist.is_initialized() else torch._C._distributed_c10d.HashStore()
    )
    clone = getattr(store, "clone", None)
    return clone() if clone is not None else store
