"""What every rank is doing, kept where the others can read it when one of them dies or hangs.

Each rank's own thread writes a small record into the key-value store through which the ranks found each other. It goes
on while the main thread is stuck, so a record that grows old means that the process is gone, frozen or cut off, and one
that stays fresh while its activity does not change means that the main thread hangs.
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
"""What may take any time; the collectives in it have their limit all the same."""
BEAT = 1.0  # [s] between two records of a rank
STALE = 4.0  # [s] after which a record is old
PATIENCE = 0.9  # part of the limit after which a rank that waits for nobody is called hanging


@dataclass(frozen=True)
class HeartbeatRecord:
    """What one rank last told.

    doing: "training", "reading data", "saving", ... since, heard: when that began and when this was written, by the
    rank's own clock [s since 1970]. waiting_in: the collective it waits in, if it does. at: where its main thread
    stood, once it has been there for long.
    """

    rank: int
    host: str
    stage: int
    iteration: int
    doing: str
    since: float
    heard: float
    waiting_in: str | None = None
    at: str | None = None

    @property
    def when(self) -> str:
        """The iteration as a part of a sentence; "" before the first, and where there are none."""
        return f" at iteration {self.iteration}" if self.iteration else ""

    def __str__(self) -> str:
        place = f"rank {self.rank} (host {self.host}, stage {self.stage}){self.when}"
        waits = f", waiting for others in {self.waiting_in}" if self.waiting_in else ""
        stands = f", standing at {self.at}" if self.at and not self.waiting_in else ""
        return f"{place}: {self.doing} for {self.heard - self.since:.0f} s{waits}{stands}"


class Heartbeat:
    """This rank's record, and the thread that keeps it fresh.

    limit [s]: how long an activity may last. hanging: called once, in the thread, when the main thread has done the
    same for nearly that long without waiting for another rank.
    """

    def __init__(self, *, rank: int, stage: int, limit: float, hanging: Callable[[HeartbeatRecord], None]) -> None:
        now = time.time()
        self._pulse = HeartbeatRecord(rank, host_name(), stage, 0, STARTING, now, now)
        self._limit, self._hanging = limit, hanging
        self._main = threading.main_thread().ident or 0
        self._store = _store()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)

    def start(self) -> None:
        """Begins to tell."""
        self._thread.start()

    def stop(self) -> None:
        """Tells nothing more."""
        self._end.set()
        self._thread.join(2 * BEAT)

    @contextmanager
    def doing(self, what: str, iteration: int | None = None) -> Iterator[None]:
        """Says what the enclosed work is; afterwards what was said before holds again, from then on.

        Not where a collective failed in it: then this is what others shall read.
        """
        before = self._pulse
        self._pulse = replace(
            before, doing=what, since=time.time(), iteration=before.iteration if iteration is None else iteration
        )
        failed = False
        try:
            yield
        except Exception as error:
            failed = failed_in_a_collective(error)
            raise
        finally:
            if not failed:
                self._pulse = replace(self._pulse, doing=before.doing, since=time.time())

    def everyone(self, world_size: int) -> list[HeartbeatRecord]:
        """The records of all ranks that told anything; none where the store cannot be reached within STALE [s].

        A host that is cut off gets no answer at all, and the network's own patience is a quarter of an hour.
        """
        found: list[list[HeartbeatRecord]] = []

        def ask() -> None:
            with suppress(RuntimeError):  # the store went with the rank that kept it
                told = [_key(rank) for rank in range(world_size) if self._store.check([_key(rank)])]
                found.append([HeartbeatRecord(**json.loads(self._store.get(key))) for key in told])

        asking = threading.Thread(target=ask, name="heart-asks", daemon=True)
        asking.start()
        asking.join(STALE)
        return found[0] if found else []

    def now(self) -> HeartbeatRecord:
        """This rank's record at this moment."""
        return replace(
            self._pulse,
            heard=time.time(),
            waiting_in=collective_in_progress(self._main),
            at=stack_summary(self._main),
        )

    def _beat(self) -> None:
        told = False
        while not self._end.is_set():
            pulse = self.now()
            with suppress(RuntimeError):  # the store may be gone with its rank; the watch over this one goes on
                self._store.set(_key(pulse.rank), json.dumps(asdict(pulse)))
            if not told and self._hangs(pulse):
                told = True
                self._hanging(pulse)
            self._end.wait(BEAT)

    def _hangs(self, pulse: HeartbeatRecord) -> bool:
        long = pulse.heard - pulse.since > PATIENCE * self._limit
        if not long or pulse.doing in UNLIMITED or pulse.waiting_in is not None:
            return False
        return device_collective_in_progress() is None


def likely_culprits(pulses: list[HeartbeatRecord], world_size: int, now: float) -> list[str]:
    """A sentence for each rank that the others most likely wait for, the likeliest first.

    Ranks that were not heard of lately come first; else those whose main thread is not waiting in a collective;
    else those that are behind the others. now: [s since 1970]; hosts' clocks may differ by less than STALE.
    """
    silent = [f"{pulse}; not heard of for {now - pulse.heard:.0f} s" for pulse in pulses if now - pulse.heard > STALE]
    missing = sorted(set(range(world_size)) - {pulse.rank for pulse in pulses})
    silent += [f"rank {rank} was never heard of" for rank in missing]
    if silent:
        return silent
    busy = [pulse for pulse in pulses if pulse.waiting_in is None and pulse.doing != "failing"]
    if busy:
        return [str(pulse) for pulse in sorted(busy, key=lambda pulse: pulse.since)]
    least = min((pulse.iteration for pulse in pulses), default=0)
    return [str(pulse) for pulse in pulses if pulse.iteration == least < max(each.iteration for each in pulses)]


def _key(rank: int) -> str:
    return f"neox/pulse/{rank}"


def _store() -> Any:
    """A connection of its own where the store has one to give, since a waiting main thread holds the first."""
    store: Any = (
        distributed_c10d._get_default_store() if dist.is_initialized() else torch._C._distributed_c10d.HashStore()
    )
    clone = getattr(store, "clone", None)
    return clone() if clone is not None else store
