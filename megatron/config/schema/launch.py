"""Hosts and launcher of the workers."""

from megatron.config.field import Section, key


class LaunchSection(Section):
    """Hosts, ports and the launcher."""

    user_script: str | None = key(None, "The script that the workers run.")
    hostfile: str | None = key(None, "File of `host slots=N` lines.")
    include: str | None = key(None, "Hosts and slots to use, as host:0,1@host2.")
    exclude: str | None = key(None, "Hosts and slots to leave out, as host:0,1@host2.")
    num_nodes: int = key(-1, "Use the first so many hosts; -1 is all.", unit="hosts")
    num_gpus: int | None = key(None, "Ranks on each host.", unit="ranks")
    global_num_gpus: int | None = key(None, "Ranks of the run, over all hosts.", unit="ranks")
    gpu_memory: float | None = key(None, "Memory of one accelerator, with which the plan is compared.", unit="GiB")
    master_addr: str | None = key(None, "Address at which the ranks meet.")
    master_port: int = key(29500, "Port at which the ranks meet.")
    launcher: str = key(
        "pdsh",
        "How workers are started: pdsh and the MPIs on other hosts only, torchrun on every host that runs deepy.py.",
        choices=("pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm", "torchrun", "jsrun", "flux", "local"),
    )
    launcher_args: str = key("", "Further arguments of the launcher, as one text.")
    force_multi: bool = key(False, "Use the launcher for several hosts even on one.")
    no_ssh_check: bool = key(False, "Do not try the hosts before starting.")
    deepspeed_mpi: bool = key(False, "Start the ranks with mpirun; OpenMPI's, unless launcher names another.")
    deepspeed_slurm: bool = key(False, "Start the ranks with srun.")
    comment: str | None = key(None, "Comment of the Slurm job.")
    account: str | None = key(None, "Account of the Slurm job.")
    autotuning_run: str | None = key(None, "Mode of DeepSpeed's autotuner: tune or run.")
    distributed_backend: str = key(
        "nccl",
        "Collectives library; gloo on machines without an accelerator.",
        choices=("nccl", "gloo", "mpi", "ucc"),
    )
    collective_timeout: float = key(
        600.0, "A rank that others wait for longer than this, or that hangs so long, ends the run.", unit="seconds"
    )
    max_restarts: int = key(0, "Restarts of a failed run from its last checkpoint.")
    strict_config: bool = key(False, "Warnings about the configuration are errors.")
    rank: int | None = key(None, "Number of this process; found in the worker.")
    local_rank: int | None = key(None, "Number of this process on its host; found in the worker.")
    lazy_mpu_init: bool = key(False, "Leave the process groups to the caller.")
    adlr_autoresume: bool = key(False, "Requeue the job through a scheduler of NVIDIA's own.")
    adlr_autoresume_interval: int = key(1000, "Steps between looks at that scheduler.", unit="steps")
    onnx_safe: bool = key(False, "Use only operations that ONNX can express.")
    deepscale: bool = key(False, "The old name of DeepSpeed.")
    deepscale_config: str | None = key(None, "The old name of DeepSpeed's configuration file.")
