"""Adam as DeepSpeed ships it for the host's processor, vectorised; made for ZeRO with an offloaded optimizer.

It is compiled at first use.
"""

from __future__ import annotations

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder

from megatron.distributed.op_build import build_lock
from megatron.errors import ConfigError
from megatron.optim.adam import BETAS, EPS
from megatron.optim.builder_args import Groups, Request, count_in_integers


def build(groups: Groups, request: Request) -> torch.optim.Optimizer:
    """DeepSpeedCPUAdam. ConfigError where it cannot be compiled."""
    try:
        with build_lock(CPUAdamBuilder()):
            optimizer = DeepSpeedCPUAdam(
                groups,
                lr=request.lr,
                betas=request.betas(BETAS),
                eps=request.number("eps", EPS),
                bias_correction=request.flag("bias_correction", True),
                adamw_mode=request.flag("adam_w_mode", True),
            )
    except RuntimeError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError.of(
            f"DeepSpeed's Adam for the CPU does not compile here: {reason}",
            key="optimizer",
            value="cpu_adam",
            hint="install g++, ninja and Python's headers, or use cpu_torch_adam",
        ) from error
    return count_in_integers(optimizer)
