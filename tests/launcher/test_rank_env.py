"""Whoever starts the processes, each finds its place, and all find one meeting point."""

import pytest

from megatron.errors import ConfigError
from megatron.launcher.rank_env import expand_hosts, set_rank_env, without_rank_env

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "4321",
    "SLURM_STEP_NODELIST": "no-such-host-[07-08]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


@pytest.mark.parametrize(
    ("given", "meeting"),
    [
        (SLURM, "10.0.0.1"),
        ({**SLURM, "SLURM_STEP_NODELIST": "localhost,other"}, "localhost"),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "1"}, "127.0.0.1"),
        (
            {
                "OMPI_COMM_WORLD_RANK": "5",
                "OMPI_COMM_WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
            },
            "127.0.0.1",
        ),
        (
            {
                **SLURM,
                "SLURM_PROCID": "0",
                "OMPI_COMM_WORLD_RANK": "5",
                "OMPI_COMM_WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            },
            "10.0.0.1",
        ),
        ({"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MASTER_ADDR": "head"}, "head"),
        ({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "8"}, "10.0.0.1"),
        (
            {
                "JSM_NAMESPACE_RANK": "5",
                "JSM_NAMESPACE_SIZE": "8",
                "JSM_NAMESPACE_LOCAL_RANK": "1",
                "LSB_MCPU_HOSTS": "batch5 1 h41n08 42 h41n09 42",
            },
            "h41n08",
        ),
        (
            {"FLUX_TASK_RANK": "5", "FLUX_JOB_SIZE": "8", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_NNODES": "1"},
            "127.0.0.1",
        ),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "pod-0"}, "pod-0"),
    ],
)
def test_positions(given: dict[str, str], meeting: str) -> None:
    environment = dict(given)
    set_rank_env(environment)
    assert [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["5", "8", "1"]
    assert environment["MASTER_ADDR"] == meeting
    assert 20_000 <= int(environment["MASTER_PORT"]) < 30_000


def test_what_is_set_already_stays() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7", **SLURM}
    set_rank_env(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_PORT"]) == ("0", "2", "7")
    assert environment["LOCAL_RANK"] == "0"


def test_ports_differ_between_jobs_and_steps() -> None:
    steps = [{**SLURM, "SLURM_STEP_ID": str(step)} for step in (0, 1)] + [{**SLURM, "SLURM_JOB_ID": "4323"}]
    for environment in steps:
        set_rank_env(environment)
    assert len({environment["MASTER_PORT"] for environment in steps}) == 3


def test_a_batch_script_of_slurm_is_no_task() -> None:
    environment = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    set_rank_env(environment)
    assert "RANK" not in environment


@pytest.mark.parametrize(
    ("given", "reported"),
    [
        ({"RANK": "1"}, "the environment has a RANK and no WORLD_SIZE; set WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "the environment has WORLD_SIZE = 2 and no RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2: there are 2 ranks"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK = 'first': this is not a number"),
        (
            {"RANK": "1", "WORLD_SIZE": "2"},
            "MASTER_ADDR: the address of rank 0 is not known to the 2 ranks; set it to the address",
        ),
    ],
)
def test_a_position_that_cannot_be(given: dict[str, str], reported: str) -> None:
    with pytest.raises(ConfigError) as error:
        set_rank_env(dict(given))
    assert reported in str(error.value)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[1-3,5]", ["n1", "n2", "n3", "n5"]),
        ("a[08-10]-ib,b", ["a08-ib", "a09-ib", "a10-ib", "b"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_lists_of_hosts(text: str, hosts: list[str]) -> None:
    assert list(expand_hosts(text)) == hosts


def test_ranks_of_one_host_take_nothing_from_an_outer_job() -> None:
    outer = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "nohost", "MASTER_PORT": "1"}
    outer |= {"OMPI_COMM_WORLD_LOCAL_RANK": "3", "PMIX_RANK": "3", "SLURM_PROCID": "3", "MPI_LOCALRANKID": "3"}
    retained = {"PATH": "/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "NCCL_DEBUG": "INFO"}
    assert without_rank_env({**outer, **retained}) == retained
