"""Initializes a worker process: process group, device, seeds and Topology.

The rank and world size come from the environment that DeepSpeed's launcher, torchrun and srun all set (RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); a process started alone is a world of one.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist

from megatron.distributed.mesh import Topology
from megatron.distributed.timeouts import record_collectives, set_collective_timeout
from megatron.errors import ConfigError, RunError
from megatron.ranks import Ranks, free_port

SHARED_MEMORY_OP = "deepspeed_shm_comm"
"""DeepSpeed's name of its shared-memory collectives."""
ACCELERATOR = "DS_ACCELERATOR"
"""The environment variable that says what ranks run on: cuda or cpu."""


def init_distributed(
    *,
    pipe_parallel_size: int,
    model_parallel_size: int,
    seed: int,
    context_parallel_size: int = 1,
    ulysses_size: int | None = None,
    zigzag: bool = True,
    key_head_size: int = 1,
    expert_parallel_size: int = 1,
    sequence_parallel: bool = False,
    fp32_allreduce: bool = False,
    backend: str = "nccl",
    timeout_seconds: float = 600.0,
    deterministic: bool = False,
) -> Topology:
    """Joins the process group, selects the device, seeds the generators and returns this rank's Topology.

    Raises ConfigError if the world size does not fit the layout, or if there is no GPU where ranks are to run on one.

    Args:
        pipe_parallel_size: pipeline stages; 0 is no pipeline.
        model_parallel_size: tensor-parallel ranks.
        seed: base seed. The Python, numpy and torch generators of every stage, data and context rank get a seed derived
            from it, so that they draw different dropout masks; tensor-parallel ranks of one shard get the same one.
        context_parallel_size: ranks that share a sequence.
        ulysses_size: those of them that exchange shards for heads, beside a ring of the others; all unless set.
        zigzag: false if shards of sequences follow each other also with a ring.
        key_head_size: tensor-parallel ranks that share a key head.
        expert_parallel_size: ranks over which experts are distributed.
        sequence_parallel: shards activations along the sequence between tensor-parallel regions.
        fp32_allreduce: sums tensors of lower precision over ranks in fp32.
        backend: backend of the process group; without CUDA it is always gloo.
        timeout_seconds: time that a collective may wait for other ranks [s].
        deterministic: allows deterministic kernels only.
    """
    ranks = Ranks.from_environment()
    pipe = max(1, pipe_parallel_size)
    share = pipe * context_parallel_size * model_parallel_size
    if ranks.world_size % share:
        raise ConfigError.of(
            f"{ranks.world_size} processes were started, which pipe {pipe} x context {context_parallel_size} x "
            f"model {model_parallel_size} = {share} ranks does not divide",
            key="pipe_parallel_size, context_parallel_size, model_parallel_size",
            hint="start a multiple of that number of processes",
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(ranks.local_rank)
    elif os.environ.get(ACCELERATOR) == "cuda":
        raise ConfigError.of(
            "the ranks are to run on GPUs, and torch finds none here",
            key=ACCELERATOR,
            value="cuda",
            location=host_name(),
            hint=f"where the hosts have no GPUs, set {ACCELERATOR}=cpu in the environment of ./deepy.py; "
            "else see what nvidia-smi says, and whether torch was installed for CPUs alone",
        )
    _use_deterministic_algorithms(deterministic)
    record_collectives()
    _init_process_group("gloo" if not on_gpu else backend, ranks, timeout_seconds)
    topology = Topology.build(
        pipe=pipe,
        context=context_parallel_size,
        model=model_parallel_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        sequence_parallel=sequence_parallel,
        fp32_reduce=fp32_allreduce,
        expert=expert_parallel_size,
        key_head=key_head_size,
        ulysses=ulysses_size,
        zigzag=zigzag,
    )
    set_collective_timeout(timeout_seconds)
    seed_generators(seed + topology.pipe.rank * topology.dp_cp.size + topology.dp_cp.rank)
    return topology


def host_name() -> str:
    """Returns the name of this host; under Slurm that of the node, since one machine may run several nodes."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def seed_generators(seed: int) -> None:
    """Seeds Python's, numpy's and torch's (all devices) generators."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def shutdown() -> None:
    """Destroys the process group, if one was initialized."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _init_process_group(backend: str, ranks: Ranks, timeout_seconds: float) -> None:
    """Initializes torch.distributed through DeepSpeed; a process started alone gets its own address."""
    import deepspeed

    without_shared_memory()
    os.environ.setdefault("RANK", str(ranks.rank))
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    os.environ.setdefault("WORLD_SIZE", str(ranks.world_size))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    timeout = timedelta(seconds=timeout_seconds)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it prints does not belong to the run's output
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    except dist.DistNetworkError as error:
        raise RunError.of(
            f"the ranks cannot meet at {os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}: {error}",
            location=f"rank {ranks.rank}",
            hint="see that MASTER_ADDR is rank 0's host, and set MASTER_PORT to a port that is free there",
        ) from error


def without_shared_memory() -> None:
    """Keeps DeepSpeed from compiling and loading its shared-memory collectives.

    They serve its own tensor-parallel inference alone, which nothing here calls, for half a minute of compilation and
    66 MiB in /dev/shm for each rank. Source: DeepSpeed 0.19.8, deepspeed/comm/torch.py (inference_all_reduce).
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False


def _use_deterministic_algorithms(deterministic: bool) -> None:
    """Allows deterministic kernels only; an op without one raises (cuBLAS needs a fixed workspace)."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # Transformer Engine's attention reads it
        torch.use_deterministic_algorithms(True)
