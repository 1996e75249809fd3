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


STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
PARTIAL = {
    "PALS with its PMI": {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PALS_RANKID": "5"},
    "PALS's own local rank": {"PMI_RANK": "5", "PMI_SIZE": "8", "PALS_LOCAL_RANKID": "1"},
    "PALS's own rank": {"PALS_RANKID": "5", "PMI_SIZE": "8", "PALS_LOCAL_RANKID": "1"},
    "MVAPICH 3": {"MVP_COMM_WORLD_RANK": "5", "MVP_COMM_WORLD_SIZE": "8", "MVP_COMM_WORLD_LOCAL_RANK": "1"},
    "a step without SLURM_NTASKS": {**STEP, "SLURM_STEP_NUM_TASKS": "8"},
    "an older Slurm": {**STEP, "SLURM_NPROCS": "8"},
    "a step of fewer tasks than its job": {**STEP, "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "16"},
    "a variable without a value": {**STEP, "SLURM_STEP_NUM_TASKS": "", "SLURM_NTASKS": "8", "PMI_RANK": ""},
    "srun --mpi=pmix": {**STEP, "SLURM_NTASKS": "8", "PMIX_RANK": "5"},
    "srun --mpi=pmi2 without SLURM_NTASKS": {**STEP, "PMI_RANK": "5", "PMI_SIZE": "8"},
    "Flux with its PMI": {"FLUX_TASK_RANK": "5", "FLUX_TASK_LOCAL_ID": "1", "PMI_RANK": "5", "PMI_SIZE": "8"},
    "a size that the user gives": {"PMIX_RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
}


@pytest.mark.parametrize("given", PARTIAL.values(), ids=PARTIAL)
def test_launchers_that_leave_a_usual_variable_out(given: dict[str, str]) -> None:
    environment = {**given, "MASTER_ADDR": "head"}
    set_rank_env(environment)
    assert [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["5", "8", "1"]


@pytest.mark.parametrize("prefix", ["OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_", "JSM_NAMESPACE_"])
def test_without_a_local_rank_it_is_0(prefix: str) -> None:
    environment = {f"{prefix}RANK": "1", f"{prefix}SIZE": "2", "MASTER_ADDR": "head"}
    set_rank_env(environment)
    assert [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["1", "2", "0"]


ALONE = {
    "salloc": {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8"},
    "salloc with a step for its shell": {**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"},
    "a batch script whose step has a number": {**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"},
    "a size of one": {"PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1"},
    "a script of LSF": {"LSB_JOBID": "1", "LSB_MCPU_HOSTS": "batch5 1 h41n08 42"},
}


@pytest.mark.parametrize("given", ALONE.values(), ids=ALONE)
def test_shells_and_scripts_of_a_job_are_alone(given: dict[str, str]) -> None:
    environment = dict(given)
    set_rank_env(environment)
    assert environment == given


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
            {"PMI_RANK": "1", "PMI_LOCAL_RANK": "1"},
            "environment: the environment has PMI_RANK = 1 and no PMI_SIZE; set WORLD_SIZE, the number of processes, "
            "as well, or unset PMI_RANK where this process is alone",
        ),
        ({"PMI_RANK": "0"}, "PMI_RANK = 0 and no PMI_SIZE"),
        ({"PALS_RANKID": "1"}, "PALS_RANKID = 1 and no PMI_SIZE"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK = 1 and no OMPI_COMM_WORLD_SIZE"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK = 1 and no number of processes"),
        (STEP, "SLURM_PROCID = 5 and no SLURM_STEP_NUM_TASKS"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            "OMPI_COMM_WORLD_SIZE = 2 and no OMPI_COMM_WORLD_RANK; set RANK for each process, or unset OMPI_COMM_WORLD",
        ),
        ({"PMI_SIZE": "2"}, "PMI_SIZE = 2 and no PMI_RANK"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, "SLURM_NTASKS = 2 and no SLURM_PROCID"),
        ({"FLUX_JOB_SIZE": "2"}, "FLUX_JOB_SIZE = 2 and no FLUX_TASK_RANK"),
        ({"PMI_RANK": "1", "PMI_SIZE": "two"}, "PMI_SIZE = 'two': this is not a number"),
        (
            {**SLURM, "PMI_RANK": "0", "PMI_SIZE": "1"},
            "the launchers disagree: PMI_RANK = 0 and PMI_SIZE = 1, but SLURM_PROCID = 5 and SLURM_NTASKS = 8; unset",
        ),
        (
            {"PMI_RANK": "0", "PMI_SIZE": "2", "WORLD_SIZE": "1"},
            "the environment has PMI_RANK = 0 and PMI_SIZE = 2, but WORLD_SIZE = 1; unset WORLD_SIZE",
        ),
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
    outer |= {"PALS_RANKID": "3", "PALS_LOCAL_SIZE": "4", "MVP_COMM_WORLD_RANK": "3", "SLURM_STEP_NUM_TASKS": "8"}
    retained = {"PATH": "/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "NCCL_DEBUG": "INFO"}
    assert without_rank_env({**outer, **retained}) == retained


def test_a_master_port_that_is_none() -> None:
    """As Kubernetes sets it where a service is named master."""
    address = {"MASTER_PORT": "tcp://10.0.0.1:29500"}
    several = {**address, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    with pytest.raises(ConfigError, match="Kubernetes service"):
        set_rank_env(several)
    for alone in (dict(address), {**address, "RANK": "0", "WORLD_SIZE": "1"}):
        set_rank_env(alone)
        assert "MASTER_PORT" not in alone
