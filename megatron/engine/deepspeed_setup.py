"""Adjustments to DeepSpeed: its logs, the reduction of gradients, modules gathered together."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups, set_z3_leaf_module
from torch.nn import Module

from megatron.config.derived.zero import REDUCTION_BUCKET
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import all_gather_items
from megatron.model.block import Block
from megatron.optim.grad_clip import GradientClipper


def cap_reduce_bucket(settings: dict[str, Any], elements: int) -> dict[str, Any]:
    """Caps `reduce_bucket_size` at the number of trainable elements; DeepSpeed allocates the bucket eagerly."""
    zero = settings["zero_optimization"]
    if zero["stage"] == 0:
        return settings
    requested = zero.get("reduce_bucket_size", REDUCTION_BUCKET)
    return {**settings, "zero_optimization": {**zero, "reduce_bucket_size": min(int(requested), elements)}}


def disable_grad_allreduce(initialised: Any, clipper: GradientClipper | None) -> None:
    """Stops DeepSpeed's all-reduce of gradients; from now on the optimizer averages momenta."""
    if hasattr(initialised, "pipeline_enable_backward_allreduce"):
        initialised.pipeline_enable_backward_allreduce = False
    else:
        initialised.enable_backward_allreduce = False
    if clipper is not None:
        clipper.grads_are_unreduced = True


def skip_lone_allreduce(initialised: Any, topology: Topology) -> None:
    """Leaves out the all-reduce of gradients where one rank has the data.

    DeepSpeed copies all gradients into a buffer, reduces it over a group of one, and copies them back. Parameters
    without a gradient get zeros, as there, so that the optimizer steps for them too.
    """
    if topology.dp_cp.size > 1:
        return

    def complete(grads: object = None, elements_per_buffer: int = 0) -> None:
        if grads is None and not hasattr(initialised.optimizer, "get_grads_for_reduction"):
            initialised._get_gradients_for_reduction()

    initialised.buffered_allreduce_fallback = complete


def create_secondary_groups(zero: Mapping[str, Any], topology: Topology) -> None:
    """Creates the groups of ranks that each keep a copy of all weights at ZeRO 3 (`zero_hpz_partition_size`).

    DeepSpeed itself would part the ranks of the world, tensor-parallel ones too, which hold other shards. Collective
    over all ranks.

    zero: the ZeRO block.
    """
    size = int(zero.get("zero_hpz_partition_size") or 1)
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of an engine before this one
    if size == 1 or zero.get("stage") != 3:
        return
    for ranks in sorted(set(all_gather_items([topology.dp_cp.ranks]))):
        for first in range(0, len(ranks), size):
            members = list(ranks[first : first + size])
            group = dist.new_group(members)  # every rank creates every group
            if topology.rank in members:
                groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = group


def mark_gathered_blocks(model: Module) -> None:
    """Marks blocks whose parameters ZeRO 3 must gather together; other stages ignore the mark."""
    for module in model.modules():
        if isinstance(module, Block) and module.zero3_gather_together:
            set_z3_leaf_module(module, True)
            module.register_forward_pre_hook(_ask_for_gradient)


def silence_deepspeed() -> None:
    """Silences DeepSpeed's INFO logs and warnings about torch names that it uses."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(max(logger.level, logging.WARNING))
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    # Its pipeline broadcasts a loss that has a gradient function; no gradient passes through that.
    warnings.filterwarnings("ignore", message=".*c10d::broadcast_: an autograd kernel was not registered")


def _ask_for_gradient(module: Module, inputs: tuple[Any, ...]) -> None:
    """Lets the input of a block have a gradient, behind a frozen embedding too.

    ZeRO 3 releases the parameters that it gathers together when the gradients of their inputs are there; without such
    an input it would release them before the backward pass.
    """
    if inputs[0].requires_grad or not torch.is_grad_enabled():
        return
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):  # ZeRO 3 shards them
        inputs[0].requires_grad_()
