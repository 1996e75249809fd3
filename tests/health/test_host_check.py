"""The comparison of hosts: what makes one of them wrong, and that real ranks can be compared."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.errors import RunError
from megatron.health import host_check
from megatron.health.host_check import HostInfo, check_hosts, find_mismatches, find_warnings, table
from tests.multi_rank import RankFailedError, run_distributed

GOOD = HostInfo(
    rank=0,
    local_rank=0,
    host="a",
    python="3.11.7",
    packages=(("torch", "2.13.0"), ("deepspeed", "0.19.8")),
    code="1" * 64,
    config="2" * 64,
    device="NVIDIA H100",
    devices=2,
    clock=0.0,
    visible=True,
    bandwidth=1e9,
)


def three_hosts(**wrong: object) -> list[HostInfo]:
    """Two ranks on each of a, b and c; b's facts are the wrong ones."""
    ranks = [replace(GOOD, rank=rank, local_rank=rank % 2, host="abc"[rank // 2]) for rank in range(6)]
    return [replace(each, **wrong) if each.host == "b" else each for each in ranks]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "reported"),
    [
        ({"code": "9" * 64}, "the code is 999999999999, where most hosts have 111111111111"),
        ({"config": "9" * 64}, "the configuration is 999999999999"),
        ({"python": "3.12.1"}, "Python is 3.12.1, where most hosts have 3.11.7"),
        ({"packages": (("torch", "2.12.0"), ("deepspeed", "0.19.8"))}, "a package is torch 2.12.0"),
        ({"device": "NVIDIA A100"}, "the device is NVIDIA A100, where most hosts have NVIDIA H100"),
        ({"devices": 1}, "2 ranks run on 1 accelerators"),
        ({"visible": False}, "use_shared_fs = True: the run directory is not the one that rank 0 sees"),
    ],
)
def test_a_wrong_host_is_named(wrong: dict[str, object], reported: str) -> None:
    (issue,) = find_mismatches(three_hosts(**wrong), shared=True)
    assert str(issue).startswith(f"host b: {reported}")
    assert issue.hint is not None


def test_equal_hosts_are_right() -> None:
    assert find_mismatches(three_hosts(), shared=True) == []


def test_without_a_shared_file_system_none_is_asked_for() -> None:
    assert find_mismatches(three_hosts(visible=False), shared=False) == []


def test_a_clock_that_is_off_is_a_warning() -> None:
    assert find_mismatches(three_hosts(clock=60.0), shared=True) == []
    assert find_warnings(three_hosts(visible=False), shared=False) == []
    (line,) = find_warnings(three_hosts(), shared=False)
    assert line.startswith("all hosts see the run directory")
    (line,) = find_warnings(three_hosts(clock=60.0), shared=True)
    assert line == "the clock of host b is +60.0 s off; times in logs do not compare"


def test_the_table_has_a_line_for_each_host() -> None:
    head, *lines = table(three_hosts()).splitlines()
    assert head.split()[:3] == ["host", "ranks", "device"]
    assert [line.split()[0:2] for line in lines] == [["a", "0-1"], ["b", "2-3"], ["c", "4-5"]]


def answering_rank(rank: int, world_size: int, folder: Path, codes: list[str], configs: list[str]) -> None:
    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    host_check.code_digest = lambda: codes[rank]  # type: ignore[assignment]
    check_hosts(configs[rank], folder, shared=True)


def test_ranks_on_two_hosts_answer(tmp_path: Path) -> None:
    run_distributed(answering_rank, 2, tmp_path, ["1" * 64] * 2, ["same"] * 2)
    assert list(tmp_path.iterdir()) == []


def test_other_code_on_one_host_stops_every_rank(tmp_path: Path) -> None:
    """A host that was not updated; without the comparison it would hang or train something else."""
    with pytest.raises(RankFailedError, match=r"host node2: the code is 2{12}") as failure:
        run_distributed(answering_rank, 3, tmp_path, ["1" * 64, "1" * 64, "2" * 64], ["same"] * 3)
    assert RunError.__name__ in str(failure.value)


def test_another_configuration_on_one_host_stops_every_rank(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="host node0: the configuration is"):
        run_distributed(answering_rank, 3, tmp_path, ["1" * 64] * 3, ["other", "same", "same"])
