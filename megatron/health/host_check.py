"""Compares code, packages, config and devices of all hosts before the run.

Ranks of one host share these, so they are reported per host. A run on one host has nothing to compare.
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
SKEW_SECONDS = 5.0  # clock difference from which on there is a warning
CODE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class HostInfo:
    """One rank's information about its host."""

    rank: int
    """The rank."""
    local_rank: int
    """Its rank on the host."""
    host: str
    """Name of the host."""
    python: str
    """Version of Python."""
    packages: tuple[tuple[str, str], ...]
    """Name and version of packages."""
    code: str
    """Digest of the code."""
    config: str
    """Digest of the configuration."""
    device: str
    """Name of the device."""
    devices: int
    """Accelerators on this host."""
    clock: float
    """Offset of its clock from rank 0's [s]."""
    visible: bool
    """Whether the host sees rank 0's run directory."""
    bandwidth: float
    """Of one all-reduce [bytes/s]; 0 if not measured."""


def check_hosts(config_text: str, folder: Path | None, *, shared: bool) -> list[str]:
    """Compares the hosts of the run and logs a table; returns the host of every rank. Collective.

    Raises RunError, the same on every rank, with each mismatch.

    Args:
        config_text: this rank's configuration, without keys that differ by rank.
        folder: the run directory.
        shared: whether all hosts must see it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [host_name()]
    infos = gather_host_info(hashlib.sha256(config_text.encode()).hexdigest(), folder)
    if len(group_by_host(infos)) > 1:
        _log.info("the hosts of this run:\n%s", table(infos))
        for line in find_warnings(infos, shared=shared):
            _log.info("%s", line)
        RunError.raise_any(find_mismatches(infos, shared=shared))
    return [each.host for each in infos]


def gather_host_info(config_digest: str, folder: Path | None) -> list[HostInfo]:
    """Gathers the information of every rank, in order, on every rank. Collective; takes less than a second.

    config_digest: of this rank's configuration. folder: the run directory; None for none.
    """
    ranks = Ranks.from_environment()
    clock = _clock_ahead()
    accelerators = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mine = HostInfo(
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


def group_by_host(infos: Sequence[HostInfo]) -> dict[str, list[HostInfo]]:
    """Returns host -> information of its ranks, in the order in which the hosts first appear."""
    found: dict[str, list[HostInfo]] = {}
    for each in infos:
        found.setdefault(each.host, []).append(each)
    return found


def find_mismatches(infos: Sequence[HostInfo], *, shared: bool) -> list[ConfigIssue]:
    """Returns the issues of hosts that differ from most hosts. shared: whether all must see one folder."""
    first = [ranks[0] for ranks in group_by_host(infos).values()]
    issues = []
    for what, of, hint in _COMPARED:
        values = [of(each) for each in first]
        usual = Counter(values).most_common(1)[0][0]
        issues += [
            ConfigIssue(f"{what} is {value}, where most hosts have {usual}", location=f"host {each.host}", hint=hint)
            for each, value in zip(first, values, strict=True)
            if value != usual
        ]
    for host, ranks in group_by_host(infos).items():
        if ranks[0].devices and len(ranks) > ranks[0].devices:
            message = f"{len(ranks)} ranks run on {ranks[0].devices} accelerators"
            issues.append(ConfigIssue(message, location=f"host {host}", hint="give it fewer slots in the hostfile"))
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


def find_warnings(infos: Sequence[HostInfo], *, shared: bool) -> list[str]:
    """Returns warnings about clocks and folders. shared: whether all hosts must see one folder."""
    message = [
        f"the clock of host {ranks[0].host} is {ranks[0].clock:+.1f} s off; times in logs do not compare"
        for ranks in group_by_host(infos).values()
        if abs(ranks[0].clock) > SKEW_SECONDS
    ]
    if not shared and all(each.visible for each in infos):
        message.append("all hosts see the run directory; with use_shared_fs: true one of them writes for all")
    return message


def table(infos: Sequence[HostInfo]) -> str:
    """Formats one line per host."""
    rows = [("host", "ranks", "device", "code", "torch", "deepspeed", "clock [s]", "shared", "all-reduce")]
    for host, ranks in group_by_host(infos).items():
        one, packages = ranks[0], dict(ranks[0].packages)
        numbers = f"{ranks[0].rank}-{ranks[-1].rank}" if len(ranks) > 1 else str(ranks[0].rank)
        device_text = f"{one.devices} x {one.device}" if one.devices else one.device
        message = (numbers, device_text, one.code[:8], packages["torch"], packages["deepspeed"], f"{one.clock:+.2f}")
        speed = f"{min(each.bandwidth for each in ranks) / 1e9:.2f} GB/s"
        rows.append((host, *message, "yes" if one.visible else "no", speed))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


@functools.cache
def code_digest() -> str:
    """Returns a digest of this package's source, independent of its path."""
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
    """Returns the offset of this host's clock from rank 0's [s], to the precision of a barrier."""
    dist.barrier()
    own = torch.tensor([time.time()], dtype=torch.float64, device=device())
    first = own.clone()
    dist.broadcast(first, src=0)
    return float(own - first)


def _sees(folder: Path | None) -> bool:
    """Returns whether this rank sees rank 0's folder at the same path."""
    theirs = [None if folder is None else str(folder.absolute())]
    dist.broadcast_object_list(theirs, src=0)
    return theirs[0] is not None and sees_files_of_rank_0(Path(theirs[0]))


def _bandwidth() -> float:
    """Returns the bus bandwidth of an all-reduce [bytes/s]: 2 (n - 1) / n of its size per rank."""
    values = torch.ones(MEASURED_BYTES // 4, device=device())
    dist.all_reduce(values)
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    share = 2 * (dist.get_world_size() - 1) / dist.get_world_size()
    return share * MEASURED_BYTES / (time.perf_counter() - started)
