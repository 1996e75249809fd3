"""DeepSpeed's vectorized Adam for the CPU, for ZeRO with an offloaded optimizer.

It is compiled at first use.
"""

from __future__ import annotations

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder

from megatron.distributed.op_build import build_lock
from megatron.errors import ConfigError
from megatron.optim.adam import BETAS, EPS
from megatron.optim.builder_args import Groups, OptimizerArgs, mark_int_step


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds DeepSpeedCPUAdam. Raises ConfigError if it cannot be compiled."""
    try:
        with build_lock(CPUAdamBuilder()):
            optimizer = DeepSpeedCPUAdam(
                groups,
                lr=args.lr,
                betas=args.betas(BETAS),
                eps=args.number("eps", EPS),
                bias_correction=args.flag("bias_correction", True),
                adamw_mode=args.flag("adam_w_mode", True),
            )
    except RuntimeError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError.of(
            f"DeepSpeed's Adam for the CPU does not compile here: {reason}",
            key="optimizer",
            value="cpu_adam",
            hint="install g++, ninja and Python's headers, or use cpu_torch_adam",
        ) from error
    return mark_int_step(optimizer)
