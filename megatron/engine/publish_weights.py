"""Sends weights that were written into an optimizer's own tensors to the parameters of the model.

DeepSpeed does so at the end of each update; here the same happens without one.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from megatron.engine.muon_step import MuonStep
from megatron.optim.unsharded import UnshardedOptimizer


@torch.no_grad()
def publish(optimizer: Any) -> None:
    """Copies the weights of the optimizer's tensors into the model, on all ranks; collective.

    optimizer: DeepSpeed's or torch's.
    """
    if isinstance(optimizer, UnshardedOptimizer):
        optimizer.scatter_weights()
    elif isinstance(optimizer, torch.optim.Optimizer):
        return  # it updates the parameters themselves
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        _publish_stage3(optimizer)
    elif isinstance(getattr(optimizer, "step", None), MuonStep):
        optimizer.step.send_weights()
    else:
        optimizer.update_lp_params()


def _publish_stage3(optimizer: Any) -> None:
    optimizer._partition_all_parameters()  # gathered ones would stay as they are
    for index, partition in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.fp16_partitioned_groups_flat[index].copy_(partition)
        optimizer._unflatten_partitioned_parameters(index)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    optimizer.invalidate_secondary_tensor()
