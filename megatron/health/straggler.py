"""Which rank holds the others up.

Ranks that train together finish every step together, so the time of a step tells nothing about a single one. What
differs is measured at every report: how long each rank waited for its data, and how long its device takes for a fixed
matrix product, which a host with lowered clocks or other work on its cores computes more slowly. Rank 0 keeps both of
every rank in `<log_dir>/ranks.jsonl`, a line a report: {iteration, host[], data_wait[] [s a step], probe[] [s]}.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

FILE_NAME = "ranks.jsonl"
LARGEST = 16 << 20  # [bytes] of that file; what is older is in ranks.old.jsonl, and what is older yet is gone
RATIO = 1.25  # times as slow as the median: from here on a rank holds the others up
REPORTS, ENOUGH = 5, 4  # it is told when that was so in 4 of 5 reports
SHARE = 0.002  # of a run's time that products may take
LONGEST = 0.05  # [s] of products in one report: longer than a scheduler lets one process wait for another


@dataclass(frozen=True)
class StepTimings:
    """What a report says of all ranks, in rank order.

    step [s]: of all of them. data_wait [s a step], probe [s a product]: of each.
    """

    step: float
    data_wait: tuple[float, ...]
    probe: tuple[float, ...]

    def slowness(self) -> list[float]:
        """How much longer a step takes with each rank than with the median one: by its product or by its waiting."""
        product, wait = statistics.median_low(self.probe), statistics.median_low(self.data_wait)
        return [
            max(probe / product, self._with_wait(own - wait))
            for probe, own in zip(self.probe, self.data_wait, strict=True)
        ]

    def reason(self, rank: int) -> str:
        """Why a rank is slow, in words."""
        product, wait = statistics.median_low(self.probe), statistics.median_low(self.data_wait)
        if self.probe[rank] / product >= self._with_wait(self.data_wait[rank] - wait):
            there, elsewhere = (f"{seconds * 1e3:.3g} ms" for seconds in (self.probe[rank], product))
            return f"a fixed matrix product takes {there} there, {elsewhere} elsewhere"
        return f"it waits {self.data_wait[rank]:.3g} s a step for its data, others {wait:.3g} s"

    def _with_wait(self, more: float) -> float:
        """A step's time over what it would be without so much waiting [s]."""
        return self.step / max(self.step - max(more, 0.0), 0.01 * self.step)


def settled(rankings: Sequence[StepTimings]) -> StepTimings:
    """The median of each rank's figures over several reports, since a single product may meet with anything."""

    def medians(columns: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(statistics.median(of_a_rank) for of_a_rank in zip(*columns, strict=True))

    step = statistics.median(each.step for each in rankings)
    return StepTimings(step, medians([each.data_wait for each in rankings]), medians([each.probe for each in rankings]))


class Probe:
    """A fixed matrix product on this rank's device. device: where."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size, kind = (2048, torch.float16) if device.type == "cuda" else (128, torch.float32)
        generator = torch.Generator().manual_seed(0)  # of its own: the run's draws stay what they are
        left, right = (torch.randn(size, size, generator=generator).to(device, kind) for _ in range(2))
        self._left, self._right, self._product = left, right, torch.empty_like(left)
        self._usual = self._timed(3)

    def seconds(self, budget: float) -> float:
        """Mean seconds of one product, over as many as fit into the budget [s]; at least one."""
        self._timed(1)  # the step has filled the caches with other things
        self._usual = self._timed(max(1, int(budget / self._usual)))
        return self._usual

    def _timed(self, count: int) -> float:
        before = time.perf_counter()
        self.multiply(count)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return (time.perf_counter() - before) / count

    def multiply(self, count: int) -> None:
        """The product, so many times."""
        with torch.no_grad():
            for _ in range(count):
                torch.mm(self._left, self._right, out=self._product)


class StragglerMonitor:
    """The pace of every rank of a run.

    hosts: of each rank. folder: where ranks.jsonl goes, None for nowhere. tell: speaks to the user.
    """

    def __init__(
        self, rank: int, hosts: Sequence[str], device: torch.device, folder: Path | None, tell: Callable[[str], None]
    ) -> None:
        self._hosts, self._device, self._tell = hosts, device, tell
        self._path = folder / FILE_NAME if folder is not None and rank == 0 and len(hosts) > 1 else None
        self._probe = Probe(device) if len(hosts) > 1 else None
        self._iteration = self._steps = 0
        self._waited = 0.0
        self._since: float | None = None
        self._judge = Judge(hosts)
        self._last: deque[StepTimings] = deque(maxlen=REPORTS)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around every wait for training data."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - before

    @contextmanager
    def recording(self, iteration: int) -> Iterator[None]:
        """Around the step that makes this iteration."""
        if self._since is None:
            self._since = time.perf_counter()
        yield
        self._iteration, self._steps = iteration, self._steps + 1

    def measure(self) -> dict[str, float]:
        """The metrics of a report, which follows on waiting for the device. Collective."""
        now = time.perf_counter()
        elapsed = now - (now if self._since is None else self._since)
        steps = max(self._steps, 1)
        own = (elapsed / steps, self._waited / steps)
        if self._probe is None:
            found = {"runtime/data_wait": own[1]}
        else:
            ranking = self._gather(*own, self._probe.seconds(min(SHARE * elapsed, LONGEST)))
            found = self._report(ranking)
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()
        return found

    def _gather(self, *own: float) -> StepTimings:
        mine = torch.tensor(own, dtype=torch.float64, device=self._device)
        everyone = torch.empty(len(self._hosts) * len(own), dtype=mine.dtype, device=self._device)
        dist.all_gather_into_tensor(everyone, mine)
        step, wait, probe = everyone.view(-1, len(own)).T.tolist()
        return StepTimings(statistics.median(step), tuple(wait), tuple(probe))

    def _report(self, ranking: StepTimings) -> dict[str, float]:
        self._last.append(ranking)
        slowness = settled(self._last).slowness()
        slowest = max(range(len(slowness)), key=slowness.__getitem__)
        for sentence in self._judge.sentences(ranking):
            self._tell(sentence)
        self._write(ranking)
        return {
            "runtime/data_wait": max(ranking.data_wait),
            "runtime/slowest_rank": float(slowest),
            "runtime/slowest_rank_ratio": slowness[slowest],
        }

    def _write(self, ranking: StepTimings) -> None:
        if self._path is None:
            return
        columns = {"data_wait": ranking.data_wait, "probe": ranking.probe}
        rounded = {name: [float(f"{value:.4g}") for value in values] for name, values in columns.items()}
        line = json.dumps({"iteration": self._iteration, "host": list(self._hosts), **rounded})
        with suppress(OSError):  # a full disk is told of by the metrics
            if self._path.exists() and self._path.stat().st_size > LARGEST:
                os.replace(self._path, self._path.with_suffix(".old.jsonl"))
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


class Judge:
    """Tells of a rank once, when it was slow in most of the last reports; again only when it was even in between."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._slow: deque[set[int]] = deque(maxlen=REPORTS)
        self._told: set[int] = set()

    def sentences(self, ranking: StepTimings) -> list[str]:
        """What is new after this report."""
        slowness = ranking.slowness()
        self._slow.append({rank for rank, ratio in enumerate(slowness) if ratio >= RATIO})
        self._told &= set().union(*self._slow)
        often = {rank for rank in self._slow[-1] if sum(rank in slow for slow in self._slow) >= ENOUGH}
        fresh = sorted(often - self._told)
        self._told |= often
        return [
            f"rank {rank} (host {self._hosts[rank]}) holds the others up, {slowness[rank]:.2f} times as slow as the "
            f"median rank, and at least {RATIO:g} times in {ENOUGH} of {REPORTS} reports: {ranking.reason(rank)}"
            for rank in fresh
        ]
