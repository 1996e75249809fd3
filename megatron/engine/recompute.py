"""Activation recomputation from the configuration: torch's function, or DeepSpeed's for partitioned inputs.

DeepSpeed can shard saved inputs over the tensor-parallel ranks (`partition_activations`), copy them into one buffer
(`contiguous_checkpointing`) and synchronize the device after each group; torch's function does none of that and costs
less. Either can keep inputs in host memory (`checkpoint_in_cpu`); DeepSpeed's implementation works on partitioned
inputs only, so without them torch's is used. With sequence parallelism there is nothing to partition: every rank has
its own shard of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import deepspeed
import torch.utils.checkpoint
from torch import Tensor

from megatron.config.schema.recompute import RecomputeSection
from megatron.distributed.mesh import Topology
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.model.recompute import Recompute

TORCH = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


def checkpoint_on_cpu(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Torch's checkpoint, with saved inputs in host memory (pinned if there is a GPU) until the backward pass."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        output: Tensor = TORCH(function, *inputs)
    return output


def full_recompute(
    section: RecomputeSection, topology: Topology, random: TensorParallelRNG, num_layers: int
) -> Recompute | None:
    """Returns how full blocks are recomputed; None if they are not.

    Args:
        section: recompute section of the configuration.
        topology: layout of the ranks.
        random: generator for random numbers on sharded tensors.
        num_layers: blocks of the full model.
    """
    asked = section.checkpoint_activations or section.recompute_granularity == "full"
    if not asked or section.recompute_granularity == "selective":
        return None
    method: Literal["block", "uniform"] = "block" if section.recompute_method == "block" else "uniform"
    checkpoint: Callable[..., Tensor] = checkpoint_on_cpu if section.checkpoint_in_cpu else TORCH
    if topology.model.sequence_parallel:  # saved inputs are already sharded over the tensor-parallel ranks
        section = section.model_copy(update={"partition_activations": False, "contiguous_checkpointing": False})
    if _is_deepspeeds(section):
        checkpoint = _deepspeed(section, topology, num_layers)
    return Recompute(checkpoint, random, layers=max(1, section.checkpoint_num_layers), method=method)


def selective_recompute(section: RecomputeSection) -> Callable[..., Tensor] | None:
    """Returns the function that recomputes the attention core; None if it is not recomputed."""
    return TORCH if section.recompute_granularity == "selective" else None


def _is_deepspeeds(section: RecomputeSection) -> bool:
    """Returns whether an option is set that only DeepSpeed's function has."""
    return any(
        (
            section.partition_activations,
            section.contiguous_checkpointing,
            section.synchronize_each_layer,
            section.profile_backward,
        )
    )


def _deepspeed(section: RecomputeSection, topology: Topology, num_layers: int) -> Callable[..., Tensor]:
    """Returns DeepSpeed's activation checkpointing, configured for this process."""
    groups = -(-num_layers // max(1, section.checkpoint_num_layers))
    deepspeed.checkpointing.configure(
        topology,
        partition_activations=section.partition_activations,
        contiguous_checkpointing=section.contiguous_checkpointing,
        num_checkpoints=groups,
        checkpoint_in_cpu=section.checkpoint_in_cpu and section.partition_activations,
        synchronize=section.synchronize_each_layer,
        profile=section.profile_backward,
    )
    return deepspeed.checkpointing.checkpoint
