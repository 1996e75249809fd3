"""The command line of every launcher, and one that really starts ranks which report over the network."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.config.config import FIELDS
from megatron.errors import ConfigError
from megatron.launcher.arguments import CHECKOUT
from megatron.launcher.cli import main
from megatron.launcher.commands.local import Rendezvous, torchrun_command
from megatron.launcher.commands.multi_host import LAUNCHERS, PROGRAMS, RANK_FILE, multi_host_command
from megatron.launcher.hosts import Hosts, HostSelection, find_hosts, slurm_allocation
from megatron.launcher.ssh_check import check_launcher, node_number
from tests.launcher.conftest import Deepy
from tests.launcher.test_supervisor import STOPS

WORKER = ("/x/train.py", "--run-config", "/run/config.json")
EVEN = Hosts({"first": (0, 1), "second": (0, 1)}, "cuda", 4)
PICKED = Hosts({"first": (0, 1), "second": (3,)}, "cuda", 3)
UNEVEN = Hosts({"first": (0, 1), "second": (0,)}, "cuda", 3)
RUN = Path("/run")
PORTS = {"slurm": 29500}  # the default, which srun does not get


def argv(launcher: str, machines: Hosts = EVEN, **more: object) -> str:
    port = PORTS.get(launcher, 1234)
    rendezvous = Rendezvous(launcher=launcher, **{"master_port": port, **more})  # type: ignore[arg-type]
    return shlex.join(multi_host_command(machines, rendezvous, WORKER, RUN, {"PATH": "/bin"}).argv)


def runner(launcher: str, options: str, master: str = "first", arguments: str = "") -> str:
    given = f" {shlex.quote(f'--launcher_args={arguments}')}" if arguments else ""
    port = PORTS.get(launcher, 1234)
    return (
        f"{sys.executable} -m deepspeed.launcher.runner --hostfile=/run/hostfile --master_addr={master} "
        f"--master_port={port} --launcher={launcher}{given} "
        f"--force_multi --no_ssh_check --log_level=error {options}"
    )


SETTINGS = "--log-dir /run DS_ACCELERATOR=cuda"
MEETING = "MASTER_ADDR=first MASTER_PORT=1234"
SCRIPT = "/x/train.py --run-config /run/config.json"
LINES = {
    "pdsh": runner(
        "pdsh",
        f"--include=first:0,1@second:0,1 --no_local_rank --module megatron.launcher.rank_agent {SETTINGS} {SCRIPT}",
    ),
    **{
        name: runner(name, f"{RANK_FILE} {SETTINGS} {MEETING} {SCRIPT}")
        for name in ("openmpi", "mpich", "impi", "mvapich")
    },
    "slurm": runner(
        "slurm",
        f"{RANK_FILE} {SETTINGS} {SCRIPT}",
        arguments="--ntasks-per-node=2 --nodes=2 --nodelist=first,second --gpus-per-node=2",
    ),
    "jsrun": "jsrun --nrs 2 --rs_per_host 1 --tasks_per_rs 2 --cpu_per_rs ALL_CPUS --gpu_per_rs 2 "
    f"--launch_distribution packed --bind none {sys.executable} -u {RANK_FILE} {SETTINGS} {MEETING} {SCRIPT}",
    "flux": "flux run --nodes 2 --tasks-per-node 2 --gpus-per-node 2 --exclusive -o mpi=none -o cpu-affinity=off "
    f"--requires=host:first,second {sys.executable} -u {RANK_FILE} {SETTINGS} {MEETING} {SCRIPT}",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_command_lines(launcher: str) -> None:
    assert argv(launcher) == LINES[launcher]


USERS = Hosts({"amd@10.0.0.1": (0, 1), "root@b": (0, 1)}, "cuda", 4)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_users_of_hosts_are_for_ssh_and_not_for_addresses(launcher: str) -> None:
    line = argv(launcher, USERS)
    assert "@" not in line
    assert "10.0.0.1" in line


@pytest.mark.parametrize("machines", [EVEN, PICKED, USERS], ids=["plain", "picked", "users"])
def test_deepspeed_starts_the_hosts_and_slots_of_the_run(machines: Hosts, tmp_path: Path) -> None:
    from deepspeed.launcher import runner as theirs

    command = multi_host_command(machines, Rendezvous(launcher="pdsh", master_port=1234), WORKER, RUN, {})
    (tmp_path / "hostfile").write_text(command.hostfile or "")
    given = theirs.parse_args(command.argv[3:])
    found = theirs.fetch_hostfile(str(tmp_path / "hostfile"))
    active = theirs.parse_inclusion_exclusion(found, given.include, given.exclude)
    assert {host: tuple(slots) for host, slots in active.items()} == machines.hosts


def test_slots_of_a_host_with_a_user_cannot_be_picked_over_pdsh() -> None:
    with pytest.raises(ConfigError, match=r"cannot choose the slots \[1\] of me@b; .*~/.ssh/config"):
        argv("pdsh", Hosts({"me@b": (1,)}, "cuda", 1))


def test_the_number_of_a_host_with_a_user() -> None:
    assert node_number(["me@first", "me@second"], {}, frozenset({"second"})) == 1


def test_every_choice_of_the_key_has_a_command() -> None:
    assert {*LAUNCHERS, "torchrun", "local"} == set(FIELDS["launcher"].choices)
    assert PROGRAMS.keys() == LAUNCHERS.keys()


def test_the_options_of_deepspeeds_runner_are_its_own() -> None:
    """The real parser of the runner takes every line, and finds the script and its arguments where they are meant."""
    from deepspeed.launcher.runner import parse_args  # takes seconds

    for name, line in LINES.items():
        if name in {"jsrun", "flux"}:
            continue
        found = parse_args(shlex.split(line)[3:])
        assert (found.launcher, found.force_multi, found.no_ssh_check) == (name, True, True)
        assert found.user_script == ("megatron.launcher.rank_agent" if name == "pdsh" else str(RANK_FILE))
        assert found.module == (name == "pdsh")
        assert found.user_args[-3:] == list(WORKER)


def test_slots_are_chosen_by_pdsh_alone() -> None:
    assert "--include=first:0,1@second:3" in argv("pdsh", PICKED)
    for launcher in LAUNCHERS.keys() - {"pdsh"}:
        with pytest.raises(ConfigError, match=r"it cannot choose the slots \[3\] of second; choose hosts, or use pdsh"):
            argv(launcher, PICKED)


def test_the_hostfile_offers_what_was_chosen() -> None:
    command = multi_host_command(PICKED, Rendezvous(launcher="pdsh"), WORKER, RUN, {})
    assert command.hostfile == "first slots=2\nsecond slots=4\n"


def test_hosts_with_different_numbers_of_ranks() -> None:
    assert "MASTER_ADDR" in argv("openmpi", UNEVEN)
    for launcher in ("mpich", "impi", "mvapich", "slurm", "jsrun", "flux"):
        with pytest.raises(ConfigError, match="as many ranks on every host, and these have first 2, second 1"):
            argv(launcher, UNEVEN)


def test_what_the_user_adds() -> None:
    assert "--launcher_args" not in argv("pdsh")
    assert "--launcher_args=-x lost" in argv("pdsh", launcher_args="-x lost")
    reported = argv("slurm", comment="a b", account="ours", launcher_args="--qos=high --gpus=4")
    assert "--qos=high --gpus=4 --ntasks-per-node=2 --nodes=2" in reported
    assert "--account=ours" in reported
    assert "comment=a b" in reported
    assert "--gpus-per-node" not in reported
    assert " -g 2 " in argv("jsrun", launcher_args="-g 2")
    assert "NEOX_SUPERVISOR=tcp://me:1/x" in argv("pdsh", supervisor="tcp://me:1/x")
    assert "MASTER_ADDR=there" in argv("openmpi", master_addr="there")
    assert "MASTER_ADDR=there MASTER_PORT=77" in argv("slurm", master_addr="there", master_port=77)


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "slurm"])
def test_modules_that_register_parts_reach_other_hosts(launcher: str) -> None:
    rendezvous, caller = Rendezvous(launcher=launcher, master_port=1234), {"NEOX_PLUGINS": "my_parts"}
    assert "NEOX_PLUGINS=my_parts" in shlex.join(multi_host_command(EVEN, rendezvous, WORKER, RUN, caller).argv)


def test_torchrun_on_one_host_of_two() -> None:
    there = {"master_addr": "first", "master_port": 1234, "node": 1}
    rendezvous = Rendezvous(launcher="torchrun", launcher_args="--max-restarts=3", **there)  # type: ignore[arg-type]
    command = torchrun_command(EVEN, rendezvous, WORKER, RUN, {})
    assert shlex.join(command.argv) == (
        f"{sys.executable} -m torch.distributed.run --nnodes=2 --node-rank=1 --nproc-per-node=2 --master-addr=first "
        f"--master-port=1234 --max-restarts=3 --module megatron.launcher.rank_agent --log-dir /run {SCRIPT}"
    )


def test_which_host_this_is() -> None:
    hosts = ["a", "b"]
    assert node_number(hosts, {"NODE_RANK": "1"}, frozenset()) == 1
    assert node_number(hosts, {}, frozenset({"b"})) == 1
    assert node_number(["a"], {}, frozenset()) == 0
    with pytest.raises(ConfigError, match="NODE_RANK: the number of this host among the 2 hosts is not known"):
        node_number(hosts, {}, frozenset())


def test_a_launcher_that_is_not_installed() -> None:
    with pytest.raises(ConfigError, match="launcher = 'flux': there is no flux on this host; install it"):
        check_launcher("flux", {"PATH": "/nowhere"})


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, {}),
        ({"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS_PER_NODE": "4"}, {"n1": 4, "n2": 4}),
        ({"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "8"}, {"n1": 8, "n2": 8}),
        ({"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "2(x2),1"}, {"n1": 2, "n2": 2, "n3": 1}),
        ({"SLURM_JOB_NODELIST": "n1"}, {"n1": 1}),
    ],
)
def test_the_allocation_of_slurm(environment: dict[str, str], found: dict[str, int]) -> None:
    assert slurm_allocation(environment) == found


def test_machines_of_schedulers(tmp_path: Path) -> None:
    job = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NTASKS_PER_NODE": "2"}
    found = find_hosts(HostSelection(launcher="slurm"), job, tmp_path)
    assert (list(found.hosts), found.world_size, found.named, found.shortage) == (["n1", "n2", "n3"], 6, True, None)
    assert find_hosts(HostSelection(launcher="slurm", exclude="n2", num_gpus=1), job, tmp_path).world_size == 2
    with pytest.raises(ConfigError, match="num_nodes = 4: the allocation offers 3 hosts"):
        find_hosts(HostSelection(launcher="slurm", num_nodes=4), job, tmp_path)
    for launcher in ("slurm", "jsrun", "flux"):
        outside = find_hosts(HostSelection(launcher=launcher, num_nodes=2, num_gpus=8), {}, tmp_path)
        assert (outside.world_size, outside.named, outside.shortage) == (16, False, None)
        unknown = find_hosts(HostSelection(launcher=launcher, global_num_gpus=96), {}, tmp_path)
        assert unknown.world_size == 96
        assert f"the hosts for {launcher} are not known" in str(unknown.shortage)
    several = find_hosts(HostSelection(launcher="torchrun", num_nodes=2, num_gpus=2), {}, tmp_path)
    assert (several.world_size, len(several.hosts)) == (4, 2)


def test_ranks_elsewhere_report_over_the_network(flux: Deepy) -> None:
    code, out, err = flux.run("print('said by', rank, os.environ['MASTER_PORT'], os.environ['WORLD_SIZE'])")
    assert code == 0, err
    assert out == "said by 0 29500 2\n"
    assert (flux.folder / "run/work/rank_1.log").read_text() == "said by 1 29500 2\n"


def test_torchrun_on_this_host(deepy: Deepy) -> None:
    code, out, err = deepy.run("print('said by', rank, os.environ['LOCAL_WORLD_SIZE'])", "--launcher", "torchrun")
    assert code == 0, err
    assert out == "said by 0 2\n"
    assert (deepy.folder / "run/work/rank_1.log").read_text() == "said by 1 2\n"


@pytest.mark.parametrize(
    ("flags", "reported"),
    [
        (
            ["--launcher", "torchrun", "--num-nodes", "2"],
            "NODE_RANK: the number of this host among the 2 hosts is not known",
        ),
        (["--launcher", "local", "--hostfile", "hosts"], "launcher = 'local': the hostfile names other hosts: far"),
        (["--launcher", "jsrun", "--hostfile", "hosts"], "launcher = 'jsrun': there is no jsrun on this host"),
    ],
)
def test_launches_that_cannot_be(
    deepy: Deepy,
    flags: list[str],
    reported: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (deepy.folder / "hosts").write_text("far slots=2\n")
    deepy.script("")
    monkeypatch.chdir(deepy.folder)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert main(["work.py", "conf.yml", *flags]) == 2
    assert reported in capsys.readouterr().err


def test_a_failure_elsewhere_names_rank_host_and_last_lines(flux: Deepy) -> None:
    code, _, err = flux.run("""
        if rank == 1:
            print("the disk is on fire", file=sys.stderr)
            sys.exit(3)
        time.sleep(600)
    """)
    assert code == 3
    assert "[rank 1] the disk is on fire" in err
    assert f"rank 1 on {os.uname().nodename} failed first, with exit code 3" in err


def test_a_stop_signal_reaches_workers_elsewhere(flux: Deepy) -> None:
    started = flux.start(STOPS.replace("SAVING", "0.5"))
    started.wait_for("ready.0", "ready.1")
    started.process.send_signal(signal.SIGTERM)
    code, _, err = started.finish()
    assert code == 0, err
    assert [(flux.folder / f"saved.{rank}").read_text() for rank in (0, 1)] == ["15\n", "15\n"]


def test_a_stranger_at_the_network_is_sent_away(flux: Deepy) -> None:
    """Whoever does not know the word cannot report for a rank."""
    code, _, err = flux.run("""
        import json, socket
        from pathlib import Path
        if rank == 0:
            line = Path(f"/proc/{os.getppid()}/cmdline").read_text()
            place = line.split("NEOX_SUPERVISOR=tcp://")[1].split("/")[0]
            host, _, port = place.rpartition(":")
            with socket.create_connection((host, int(port))) as link:
                link.sendall(json.dumps({"rank": 1, "token": "guess", "code": 9, "tail": []}).encode() + b"\\n")
                assert link.recv(1) == b""
    """)
    assert code == 0, err


@pytest.mark.parametrize("name", ["my dir", "a(b)", "$HOME", "it's", "*", "50%n", "a;b", "{a,b}"])
def test_a_folder_that_a_shell_behind_pdsh_would_change(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(ConfigError, match=r"the path of the working folder holds .* another launcher than pdsh"):
            argv("pdsh")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    with pytest.raises(ConfigError, match="the path of the interpreter holds"):
        argv("pdsh")


def test_a_plain_folder_is_one_word_for_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Ünï_1-2+3=4.5,6:7@8"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert argv("pdsh")
    done = subprocess.run(
        ["bash", "-c", f"cd {folder}; pwd"], capture_output=True, cwd="/", encoding="utf-8", check=True
    )
    assert (done.stdout, done.stderr) == (f"{folder}\n", "")


@pytest.mark.parametrize("launcher", ["openmpi", "mpich", "impi", "mvapich", "slurm"])
def test_ranks_find_modules_beside_a_folder_with_a_blank(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's runner puts PYTHONPATH in double quotes, and no shell of these launchers takes them off again."""
    from deepspeed.launcher.multinode_runner import MultiNodeRunner

    for name in ("my dir, too", "plain"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        command = multi_host_command(EVEN, Rendezvous(launcher=launcher), WORKER, RUN, {})
        expected = f"{folder}:{CHECKOUT}"
        assert (f"PYTHONPATH={expected}" in command.argv) == (name != "plain")
        exports = SimpleNamespace(exports={})
        MultiNodeRunner.add_export(exports, "PYTHONPATH", expected)
        shown = [sys.executable, "-c", "import sys; print(sys.path[1:3])"]
        given = ["PYTHONPATH=" + expected] if name != "plain" else []
        done = subprocess.run(
            [sys.executable, "-S", str(RANK_FILE), *given, *shown[1:]],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env=exports.exports,
        )
        assert done.stdout == f"{[str(folder), str(CHECKOUT)]}\n", done.stderr


@pytest.mark.parametrize(
    "value",
    [
        "cores(1)",
        "/tmp/nccl.%h.%p",
        "100%% of %n",
        "allreduce:tree;broadcast:ring",
        "{0,1},{2,3}",
        "{0:4}, {4:4}",
        "/tmp/nccl.$HOSTNAME.log",
        "/tmp/a folder/$HOSTNAME",
        "it's",
        "it's a 'word'",
        'say "yes"',
        '"quoted"',
        "back\\slash and `command` $(more)",
        "*",
        "~",
        "a&b|c<d>e#f!g",
        "two  blanks",
        "",
    ],
)
def test_a_shell_behind_pdsh_reads_every_variable_as_it_is(value: str) -> None:
    """Through DeepSpeed's own handling of arguments, and a shell that reads its words joined by blanks."""
    command = multi_host_command(
        Hosts({"a": (0,)}, "cpu", 1), Rendezvous(launcher="pdsh"), WORKER, RUN, {"NCCL_VALUE": value}
    )
    words = command.argv[command.argv.index("megatron.launcher.rank_agent") + 1 :]
    from deepspeed.launcher.multinode_runner import PDSHRunner

    handed_on = PDSHRunner.parse_user_args(SimpleNamespace(args=SimpleNamespace(user_args=list(words))))
    names = {"h": "a", "u": "root", "n": "0", "%": "%"}
    of_pdsh = [re.sub("%([hun%])", lambda found: names[found.group(1)], word) for word in handed_on]
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {' '.join(of_pdsh)}"], capture_output=True, text=True, check=True
    )
    read = done.stdout.split("\0")[:-1]
    assert f"NCCL_VALUE={value}" in read
    assert read[-len(WORKER) :] == list(WORKER)
