"""Where the ranks run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.errors import ConfigError
from megatron.launcher import hosts
from megatron.launcher.hosts import Hosts, HostSelection, core_count, find_hosts, read_hostfile


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hostfile"
    path.write_text("# the cluster\nfirst slots=4\n\nsecond   slots=4  # spare\nthird slots=2\n")
    return str(path)


@pytest.fixture
def eight_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Device files of eight GPUs, and a torch that could use them."""
    monkeypatch.setattr(hosts, "_torch_is_for_cpus", lambda: False)
    devices = tmp_path / "dev"
    devices.mkdir()
    for name in [*(f"nvidia{number}" for number in range(8)), "nvidiactl", "nvidia-uvm"]:
        (devices / name).touch()
    return devices


def test_one_process_on_the_cpus_or_as_many_as_asked(tmp_path: Path) -> None:
    assert find_hosts(HostSelection(), {}, tmp_path) == Hosts({"localhost": (0,)}, "cpu", 1)
    assert find_hosts(HostSelection(num_gpus=2), {}, tmp_path) == Hosts({"localhost": (0, 1)}, "cpu", 2)
    assert find_hosts(HostSelection(global_num_gpus=2), {}, tmp_path).world_size == 2


def test_processes_on_cpus_are_not_chosen_by_slot(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="include = 'localhost:0': this machine has no accelerators to choose from"):
        find_hosts(HostSelection(include="localhost:0"), {}, tmp_path)


def test_a_cluster_can_be_planned_but_not_started_on_a_laptop(tmp_path: Path) -> None:
    machines = find_hosts(HostSelection(global_num_gpus=1024), {}, tmp_path)
    assert machines.world_size == 1024
    assert machines.shortage is not None
    assert f"{core_count()} CPU cores cannot carry" in machines.shortage


def test_the_local_accelerators(eight_gpus: Path) -> None:
    assert find_hosts(HostSelection(), {}, eight_gpus) == Hosts({"localhost": tuple(range(8))}, "cuda", 8)
    assert find_hosts(HostSelection(num_gpus=2), {}, eight_gpus).hosts == {"localhost": (0, 1)}
    assert find_hosts(HostSelection(), {"CUDA_VISIBLE_DEVICES": "3,5"}, eight_gpus).hosts == {"localhost": (3, 5)}
    assert find_hosts(HostSelection(), {"CUDA_VISIBLE_DEVICES": "GPU-8f"}, eight_gpus).hosts == {
        "localhost": ("GPU-8f",)
    }
    assert find_hosts(HostSelection(include="localhost:1,6"), {}, eight_gpus).hosts == {"localhost": (1, 6)}
    assert find_hosts(HostSelection(), {"CUDA_VISIBLE_DEVICES": ""}, eight_gpus).accelerator == "cpu"
    assert find_hosts(HostSelection(), {"DS_ACCELERATOR": "cpu"}, eight_gpus).accelerator == "cpu"
    assert "offers 8 accelerators" in str(find_hosts(HostSelection(global_num_gpus=96), {}, eight_gpus).shortage)


def test_a_torch_for_cpus_uses_no_gpu(eight_gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_torch_is_for_cpus", lambda: True)
    assert find_hosts(HostSelection(), {}, eight_gpus).accelerator == "cpu"


def test_a_hostfile_and_what_is_chosen_of_it(hostfile: str) -> None:
    everything = find_hosts(HostSelection(hostfile=hostfile), {})
    assert everything.world_size == 10
    assert everything.accelerator == "cuda"
    assert not everything.is_local
    assert find_hosts(HostSelection(hostfile=hostfile, num_nodes=2), {}).world_size == 8
    assert find_hosts(HostSelection(hostfile=hostfile, num_gpus=2), {}).world_size == 6
    chosen = find_hosts(HostSelection(hostfile=hostfile, include="second:1,3@third"), {})
    assert chosen.hosts == {"second": (1, 3), "third": (0, 1)}
    left = find_hosts(HostSelection(hostfile=hostfile, exclude="first@second:0"), {})
    assert left.hosts == {"second": (1, 2, 3), "third": (0, 1)}


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        ({}, {"amd@192.168.1.10": (0, 1), "root@b": (0,), "plain": (0, 1)}),
        ({"include": "amd@192.168.1.10"}, {"amd@192.168.1.10": (0, 1)}),
        ({"include": "amd@192.168.1.10:1@plain"}, {"amd@192.168.1.10": (1,), "plain": (0, 1)}),
        ({"include": "plain:1@root@b:0@amd@192.168.1.10:0"}, {"amd@192.168.1.10": (0,), "root@b": (0,), "plain": (1,)}),
        ({"exclude": "root@b@plain:0"}, {"amd@192.168.1.10": (0, 1), "plain": (1,)}),
    ],
)
def test_hosts_with_users_are_chosen(selection: dict[str, str], chosen: hosts.Slots, tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("amd@192.168.1.10 slots=2\nroot@b slots=1\nplain slots=2\n")
    assert find_hosts(HostSelection(hostfile=str(path), **selection), {}).hosts == chosen  # type: ignore[arg-type]


def test_a_user_on_this_host_has_its_devices(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("me@localhost slots=2\n")
    assert find_hosts(HostSelection(hostfile=str(path)), {}, tmp_path).accelerator == "cpu"


def test_the_hostfile_of_the_environment_and_the_default_that_is_not_there(hostfile: str, tmp_path: Path) -> None:
    assert find_hosts(HostSelection(), {"DLTS_HOSTFILE": hostfile}).world_size == 10
    assert find_hosts(HostSelection(hostfile="/job/hostfile"), {}, tmp_path).world_size == 1


@pytest.mark.parametrize(
    ("expected", "reported"),
    [
        (HostSelection(include="fourth"), "there is no host fourth"),
        (HostSelection(include="first:7"), "first has no slot 7"),
        (HostSelection(exclude="first@second@third"), "no slot is left"),
        (HostSelection(include="first", exclude="second"), "cannot both be given"),
        (HostSelection(num_nodes=4), "offers 3 hosts"),
        (HostSelection(num_gpus=3), "third has 2 slots"),
        (HostSelection(global_num_gpus=16), "gives 10 ranks"),
    ],
)
def test_choices_that_cannot_be(hostfile: str, expected: HostSelection, reported: str) -> None:
    with pytest.raises(ConfigError, match=reported):
        find_hosts(HostSelection(**{**vars(expected), "hostfile": hostfile}), {})


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("first slots=4\nsecond 4\n", "hostfile:2: hostfile: this is not `host slots=N`: second 4"),
        ("first slots=4\nfirst slots=4\n", "hostfile:2: hostfile: the host first is listed twice"),
        ("first slots=0\n", "hostfile:1: "),
        ("# nothing\n", "no host in it"),
    ],
)
def test_a_hostfile_that_is_wrong_names_the_line(tmp_path: Path, text: str, reported: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert reported in str(caught.value)


def test_a_byte_order_mark_and_dos_line_ends_are_no_part_of_a_host(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_bytes(b"\xef\xbb\xbffirst slots=4\r\nsecond slots=2\r\n")
    assert read_hostfile(tmp_path / "hostfile") == {"first": 4, "second": 2}


def test_a_hostfile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        find_hosts(HostSelection(hostfile=str(tmp_path / "none")), {})


def test_a_hostfile_in_utf_16_is_named(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("first slots=2\n", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"hostfile = '.*hostfile': it is not UTF-8; save the hostfile as UTF-8"):
        read_hostfile(hostfile)
