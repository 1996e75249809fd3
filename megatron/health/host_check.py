"""What every host of a run is and has, gathered before anything is built on it, so that a wrong one is named.

Ranks of one host share code, packages and devices, so rank by rank facts are told host by host. A run on one host has
nothing to compare.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from megatron.distributed.init import host_name
from megatron.distributed.process_group import all_gather_list, device
from megatron.distributed.shared_folder import sees_files_of_rank_0
from megatron.errors import ConfigIssue, RunError
from megatron.log import get_logger
from megatron.ranks import Ranks

_log = get_logger(__name__)

PACKAGES = ("torch", "deepspeed", "numpy", "transformers", "triton")
MEASURED_BYTES = 4 << 20  # of the all-reduce that is timed
SKEW_SECONDS = 5.0  # from which on a clock is worth a warning
CODE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Facts:
    """One rank's view of its host.

    code, config: digests. clock: how far its clock is ahead of rank 0's [s]. visible: whether the host sees the folder
    that the others see. devices: accelerators on this host. bandwidth: of one all-reduce [bytes/s], 0 if not measured.
    """

    rank: int
    local_rank: int
    host: str
    python: str
    packages: tuple[tuple[str, str], ...]
    code: str
    config: str
    device: str
    devices: int
    clock: float
    visible: bool
    bandwidth: float


def roll_call(config_text: str, folder: Path | None, *, shared: bool) -> list[str]:
    """Compares the hosts of the run and says so in one table; returns the host of every rank. Collective.

    config_text: the configuration as this rank has it, without what differs by rank. folder: the run directory.
    shared: all hosts must see it. Raises RunError, the same on every rank, that names each wrong host.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [host_name()]
    facts = gather_host_info(hashlib.sha256(config_text.encode()).hexdigest(), folder)
    if len(hosts(facts)) > 1:
        _log.info("the hosts of this run:\n%s", table(facts))
        for line in warnings(facts, shared=shared):
            _log.info("%s", line)
        RunError.raise_any(judge(facts, shared=shared))
    return [each.host for each in facts]


def gather_host_info(config_digest: str, folder: Path | None) -> list[Facts]:
    """The facts of every rank, in order, on every rank. Collective; takes less than a second.

    config_digest: of this rank's configuration. folder: rank 0's, which all hosts should see; None to ask for none.
    """
    ranks = Ranks.from_environment()
    clock = _clock_ahead()
    accelerators = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mine = Facts(
        rank=ranks.rank,
        local_rank=ranks.local_rank,
        host=host_name(),
        python=platform.python_version(),
        packages=tuple((name, _version(name)) for name in PACKAGES),
        code=code_digest(),
        config=config_digest,
        device=torch.cuda.get_device_name() if accelerators else platform.machine(),
        devices=accelerators,
        clock=clock,
        visible=_sees(folder),
        bandwidth=_bandwidth(),
    )
    return all_gather_list(mine)


def hosts(facts: Sequence[Facts]) -> dict[str, list[Facts]]:
    """Host -> the facts of its ranks, in the order in which the hosts first appear."""
    found: dict[str, list[Facts]] = {}
    for each in facts:
        found.setdefault(each.host, []).append(each)
    return found


def judge(facts: Sequence[Facts], *, shared: bool) -> list[ConfigIssue]:
    """What is wrong with which host, compared with what most hosts have. shared: all should see one folder."""
    first = [ranks[0] for ranks in hosts(facts).values()]
    issues = []
    for what, of, hint in _COMPARED:
        values = [of(each) for each in first]
        usual = Counter(values).most_common(1)[0][0]
        issues += [
            ConfigIssue(f"{what} is {value}, where most hosts have {usual}", location=f"host {each.host}", hint=hint)
            for each, value in zip(first, values, strict=True)
            if value != usual
        ]
    for host, ranks in hosts(facts).items():
        if ranks[0].devices and len(ranks) > ranks[0].devices:
            told = f"{len(ranks)} ranks run on {ranks[0].devices} accelerators"
            issues.append(ConfigIssue(told, location=f"host {host}", hint="give it fewer slots in the hostfile"))
        if shared and not all(each.visible for each in ranks):
            issues.append(
                ConfigIssue(
                    "the run directory is not the one that rank 0 sees",
                    key="use_shared_fs",
                    value=True,
                    location=f"host {host}",
                    hint="mount the shared file system there, or set use_shared_fs: false",
                )
            )
    return issues


def warnings(facts: Sequence[Facts], *, shared: bool) -> list[str]:
    """What is odd without being wrong. shared: all hosts should see one folder."""
    told = [
        f"the clock of host {ranks[0].host} is {ranks[0].clock:+.1f} s off; times in logs do not compare"
        for ranks in hosts(facts).values()
        if abs(ranks[0].clock) > SKEW_SECONDS
    ]
    if not shared and all(each.visible for each in facts):
        told.append("all hosts see the run directory; with use_shared_fs: true one of them writes for all")
    return told


def table(facts: Sequence[Facts]) -> str:
    """One line a host."""
    rows = [("host", "ranks", "device", "code", "torch", "deepspeed", "clock [s]", "shared", "all-reduce")]
    for host, ranks in hosts(facts).items():
        one, packages = ranks[0], dict(ranks[0].packages)
        numbers = f"{ranks[0].rank}-{ranks[-1].rank}" if len(ranks) > 1 else str(ranks[0].rank)
        device_told = f"{one.devices} x {one.device}" if one.devices else one.device
        told = (numbers, device_told, one.code[:8], packages["torch"], packages["deepspeed"], f"{one.clock:+.2f}")
        speed = f"{min(each.bandwidth for each in ranks) / 1e9:.2f} GB/s"
        rows.append((host, *told, "yes" if one.visible else "no", speed))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


@functools.cache
def code_digest() -> str:
    """A digest of this package's source, the same wherever the same code is installed."""
    digest = hashlib.sha256()
    for path in sorted(CODE.rglob("*.py")):
        digest.update(str(path.relative_to(CODE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


_COMPARED = (
    ("the code", lambda each: each.code[:12], "install the same revision of this project on every host"),
    ("the configuration", lambda each: each.config[:12], "start every host with the same configuration files"),
    ("Python", lambda each: each.python, "use the same environment on every host"),
    (
        "a package",
        lambda each: ", ".join(f"{name} {number}" for name, number in each.packages),
        "install the versions of requirements/constraints.txt on every host",
    ),
    ("the device", lambda each: each.device, "use hosts of one kind, or leave this one out with --exclude"),
)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _clock_ahead() -> float:
    """How far this host's clock is ahead of rank 0's [s], as exact as a barrier is quick."""
    dist.barrier()
    own = torch.tensor([time.time()], dtype=torch.float64, device=device())
    first = own.clone()
    dist.broadcast(first, src=0)
    return float(own - first)


def _sees(folder: Path | None) -> bool:
    """Whether this rank sees rank 0's folder, under the name that it has there."""
    theirs = [None if folder is None else str(folder.absolute())]
    dist.broadcast_object_list(theirs, src=0)
    return theirs[0] is not None and sees_files_of_rank_0(Path(theirs[0]))


def _bandwidth() -> float:
    """Bytes a second that a ring all-reduce must move through each rank's link, 2 (n - 1) / n of its size."""
    values = torch.ones(MEASURED_BYTES // 4, device=device())
    dist.all_reduce(values)
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    share = 2 * (dist.get_world_size() - 1) / dist.get_world_size()
    return share * MEASURED_BYTES / (time.perf_counter() - started)
