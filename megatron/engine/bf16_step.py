"""The step of DeepSpeed's bfloat16 optimizer (ZeRO 1, fp32 gradients) without a host that waits for the device.

DeepSpeed's own step reads two values of every step on the host: whether the gradient norm is finite, and whether it
exceeds the limit of clipping. Here both decisions are made on the device. The arithmetic is the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from megatron.distributed.partial_grads import sum_at_step, sum_together
from megatron.optim.skip_update import set_skip, skips_on_device


class Bf16Step:
    """Takes the place of the optimizer's `step`; norm, skipped and unclipped are those of the last one."""

    def __init__(self, optimizer: Any) -> None:
        """Creates the step. optimizer: DeepSpeed's bfloat16 optimizer around a fused one."""
        self._optimizer = optimizer
        self._partial = dict(sum_at_step(one for group in optimizer.bf16_groups for one in group))
        self.norm = torch.zeros(())
        self.skipped = torch.zeros((), dtype=torch.bool)

    @property
    def unclipped(self) -> Tensor:
        """Factor from the clipped gradients to those before, float64."""
        limit = self._optimizer.clip_grad
        norm = self.norm.double()
        return torch.clamp((norm + 1e-6) / limit, min=1.0) if limit > 0 else torch.ones_like(norm)

    @torch.no_grad()
    def __call__(self, closure: None = None) -> None:
        """Clips the gradients and updates the weights, where the gradient norm is finite on all ranks."""
        zero = self._optimizer
        self._sum_partial()
        norm = self._total_norm()
        self.skipped = ~torch.isfinite(norm)
        self.norm = norm.masked_fill(self.skipped, float("inf"))
        zero._global_grad_norm = self.norm
        if zero.clip_grad > 0:
            gradients = zero.get_grads_for_norm(for_clipping=True)
            if gradients:
                torch._foreach_mul_(gradients, torch.clamp(zero.clip_grad / (norm + 1e-6), max=1.0))
        partitions = zero.fp32_groups_flat_partition
        for partition, gradient in zip(partitions, zero.fp32_groups_gradient_flat_partition, strict=True):
            partition.grad = gradient.to(partition.dtype)
        set_skip(zero.optimizer, self.skipped)
        zero.optimizer.step()
        if zero.grad_acc_dtype is not torch.float32:
            for partition in partitions:
                partition.grad = None
        zero._lazy_init_hp_params_optimizer_state()
        zero.update_lp_params()
        zero.clear_hp_grads()

    def _sum_partial(self) -> None:
        """Sums the fp32 gradients that are partial over tensor-parallel ranks."""
        zero, found = self._optimizer, []
        for group, gradients, present in zip(
            zero.bf16_groups, zero.fp32_groups_gradients, zero.fp32_groups_has_gradients, strict=True
        ):
            for parameter, gradient, is_there in zip(group, gradients, present, strict=True):
                if is_there and parameter in self._partial:
                    found.append((gradient, self._partial[parameter]))
        sum_together(found)

    def _total_norm(self) -> Tensor:
        """Returns the gradient norm, the same on every rank of the replica."""
        counted, _ = self._optimizer.get_grads_for_norm()
        norms = [gradient.detach().float().norm(2.0) for gradient in counted]
        square = torch.stack(norms).pow(2.0).sum()
        if self._optimizer.mpu is not None:
            dist.all_reduce(square, group=self._optimizer.mpu.get_model_parallel_group())
        return square.pow(0.5)


def replace_step(optimizer: Any) -> Bf16Step | None:
    """Replaces the step of DeepSpeed's optimizer, or returns None where that has to stay.

    It stays outside of BF16_Optimizer, where experts are distributed (the exchange of tokens makes the host wait
    anyway), and with an optimizer that cannot leave out an update on the device.
    """
    if not isinstance(optimizer, BF16_Optimizer) or optimizer.has_moe_layers:
        return None
    if not skips_on_device(optimizer.optimizer):
        return None
    step = Bf16Step(optimizer)
    optimizer.step = step
    return step
