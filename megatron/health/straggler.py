"""Straggler detection: finds the ranks that slow down all others.

Ranks that train together finish every step together, so step times do not differ by rank. Two times do, and are
measured at every report: the wait for data, and the time of a fixed matrix product, which a device with lowered clocks
or a host with other load computes more slowly. Rank 0 writes both to `<log_dir>/ranks.jsonl`, one line per report:
{iteration, host[], data_wait[] [s per step], probe[] [s]}.
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

from megatron.atomic import open_lines

FILE_NAME = "ranks.jsonl"
MAX_FILE_SIZE = 16 << 20  # [bytes] of that file, which is then renamed to ranks.old.jsonl
SLOW_RATIO = 1.25  # a step's time over that of the median rank, from which on a rank is slow
WINDOW, MIN_SLOW_REPORTS = 5, 4  # a rank is reported when it was slow in 4 of 5 reports
PROBE_SHARE = 0.002  # of the run's time, for products
MAX_PROBE_SECONDS = 0.05  # [s] of products in one report: longer than a time slice of the scheduler


@dataclass(frozen=True)
class StepTimings:
    """Timings of one report, in rank order."""

    step: float
    """Time of a step, of all ranks [s]."""
    data_wait: tuple[float, ...]
    """Wait for data of each rank [s per step]."""
    probe: tuple[float, ...]
    """Time of the product of each rank [s]."""

    def slowness(self) -> list[float]:
        """Returns for each rank how much longer a step takes than with the median rank."""
        product, wait = statistics.median_low(self.probe), statistics.median_low(self.data_wait)
        return [
            max(probe / product, self._wait_ratio(own - wait))
            for probe, own in zip(self.probe, self.data_wait, strict=True)
        ]

    def reason(self, rank: int) -> str:
        """Returns the reason why a rank is slow."""
        product, wait = statistics.median_low(self.probe), statistics.median_low(self.data_wait)
        if self.probe[rank] / product >= self._wait_ratio(self.data_wait[rank] - wait):
            there, elsewhere = (f"{seconds * 1e3:.3g} ms" for seconds in (self.probe[rank], product))
            return f"a fixed matrix product takes {there} there, {elsewhere} elsewhere"
        return f"it waits {self.data_wait[rank]:.3g} s a step for its data, others {wait:.3g} s"

    def _wait_ratio(self, more: float) -> float:
        """Returns the step time over the step time without `more` seconds of waiting."""
        return self.step / max(self.step - max(more, 0.0), 0.01 * self.step)


def median_timings(reports: Sequence[StepTimings]) -> StepTimings:
    """Returns the median of each rank's timings over several reports, since single ones are noisy."""

    def medians(columns: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(statistics.median(of_a_rank) for of_a_rank in zip(*columns, strict=True))

    step = statistics.median(each.step for each in reports)
    return StepTimings(step, medians([each.data_wait for each in reports]), medians([each.probe for each in reports]))


class Probe:
    """A fixed matrix product on this rank's device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size, kind = (2048, torch.float16) if device.type == "cuda" else (128, torch.float32)
        generator = torch.Generator().manual_seed(0)  # its own, so that the run's random numbers do not change
        left, right = (torch.randn(size, size, generator=generator).to(device, kind) for _ in range(2))
        self._left, self._right, self._product = left, right, torch.empty_like(left)
        self._usual = self._time_products(3)

    def seconds(self, budget: float) -> float:
        """Returns the mean time of a product [s], over as many as fit into the budget [s]; at least one."""
        self._time_products(1)  # warm the caches
        self._usual = self._time_products(max(1, int(budget / self._usual)))
        return self._usual

    def _time_products(self, count: int) -> float:
        before = time.perf_counter()
        self.multiply(count)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return (time.perf_counter() - before) / count

    def multiply(self, count: int) -> None:
        """Computes the product `count` times."""
        with torch.no_grad():
            for _ in range(count):
                torch.mm(self._left, self._right, out=self._product)


class StragglerMonitor:
    """Measures every rank and reports stragglers."""

    def __init__(
        self, rank: int, hosts: Sequence[str], device: torch.device, folder: Path | None, log: Callable[[str], None]
    ) -> None:
        """Prepares the measurement.

        Args:
            rank: of this process.
            hosts: of each rank.
            device: of this rank.
            folder: of ranks.jsonl; None to write nothing.
            log: writes a sentence for the user.
        """
        self._hosts, self._device, self._log = hosts, device, log
        self._path = folder / FILE_NAME if folder is not None and rank == 0 and len(hosts) > 1 else None
        self._probe = Probe(device) if len(hosts) > 1 else None
        self._iteration = self._steps = 0
        self._waited = 0.0
        self._since: float | None = None
        self._alarm = StragglerAlarm(hosts)
        self._last: deque[StepTimings] = deque(maxlen=WINDOW)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times a wait for training data."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - before

    @contextmanager
    def recording(self, iteration: int) -> Iterator[None]:
        """Counts the step of this iteration."""
        if self._since is None:
            self._since = time.perf_counter()
        yield
        self._iteration, self._steps = iteration, self._steps + 1

    def measure(self) -> dict[str, float]:
        """Returns the metrics of a report, after a synchronization with the device. Collective."""
        now = time.perf_counter()
        elapsed = now - (now if self._since is None else self._since)
        steps = max(self._steps, 1)
        own = (elapsed / steps, self._waited / steps)
        if self._probe is None:
            found = {"runtime/data_wait": own[1]}
        else:
            timings = self._gather(*own, self._probe.seconds(min(PROBE_SHARE * elapsed, MAX_PROBE_SECONDS)))
            found = self._report(timings)
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()
        return found

    def _gather(self, *own: float) -> StepTimings:
        mine = torch.tensor(own, dtype=torch.float64, device=self._device)
        everyone = torch.empty(len(self._hosts) * len(own), dtype=mine.dtype, device=self._device)
        dist.all_gather_into_tensor(everyone, mine)
        step, wait, probe = everyone.view(-1, len(own)).T.tolist()
        return StepTimings(statistics.median(step), tuple(wait), tuple(probe))

    def _report(self, timings: StepTimings) -> dict[str, float]:
        self._last.append(timings)
        slowness = median_timings(self._last).slowness()
        slowest = max(range(len(slowness)), key=slowness.__getitem__)
        for sentence in self._alarm.sentences(timings):
            self._log(sentence)
        self._write(timings)
        return {
            "runtime/data_wait": max(timings.data_wait),
            "runtime/slowest_rank": float(slowest),
            "runtime/slowest_rank_ratio": slowness[slowest],
        }

    def _write(self, timings: StepTimings) -> None:
        if self._path is None:
            return
        columns = {"data_wait": timings.data_wait, "probe": timings.probe}
        rounded = {name: [float(f"{value:.4g}") for value in values] for name, values in columns.items()}
        line = json.dumps({"iteration": self._iteration, "host": list(self._hosts), **rounded})
        with suppress(OSError):  # a full disk is reported by the metrics
            if self._path.exists() and self._path.stat().st_size > MAX_FILE_SIZE:
                os.replace(self._path, self._path.with_suffix(".old.jsonl"))
            with open_lines(self._path) as file:
                file.write(line + "\n")


class StragglerAlarm:
    """Reports a rank once when it was slow in most of the last reports; again only after it was even."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._last: deque[StepTimings] = deque(maxlen=WINDOW)
        self._slow: deque[set[int]] = deque(maxlen=WINDOW)
        self._reported: set[int] = set()

    def sentences(self, timings: StepTimings) -> list[str]:
        """Returns a sentence for each new straggler after this report, with the medians of the last reports."""
        self._last.append(timings)
        self._slow.append({rank for rank, ratio in enumerate(timings.slowness()) if ratio >= SLOW_RATIO})
        self._reported &= set().union(*self._slow)
        often = {rank for rank in self._slow[-1] if sum(rank in slow for slow in self._slow) >= MIN_SLOW_REPORTS}
        fresh = sorted(often - self._reported)
        self._reported |= often
        usual = median_timings(self._last)
        slowness = usual.slowness()
        return [
            f"rank {rank} (host {self._hosts[rank]}) is a straggler: {slowness[rank]:.2f} times as slow as the "
            f"median rank, and at least {SLOW_RATIO:g} times in {MIN_SLOW_REPORTS} of {WINDOW} reports: "
            f"{usual.reason(rank)}"
            for rank in fresh
        ]
