"""Global gradient norm and clipping at ZeRO 0; at other stages DeepSpeed computes both, or engine/bf16_step.py.

DeepSpeed's own norm counts parameters by rank and counts tied weights twice when a pipeline has several stages. Here
parameter attributes decide which rank counts a parameter: a sharded one counts on every tensor-parallel rank, a
replicated one on the first only, a tied one on the first of its stages only, and experts on each of their ranks.
Clipping scales all gradients by max_norm / (norm + 1e-6) when the norm exceeds max_norm (arXiv:1211.5063, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron.distributed.mesh import Topology
from megatron.distributed.param_attrs import expert_rank_and_size, is_sharded, is_tied
from megatron.distributed.partial_grads import sum_at_step, sum_together
from megatron.optim.skip_update import set_skip, skips_on_device


class StepValues(Protocol):
    """What the last optimizer step computed of its gradients; scalars on the device."""

    @property
    def norm(self) -> Tensor:
        """Gradient norm before clipping."""

    @property
    def skipped(self) -> Tensor:
        """True if the norm was not finite, so that the update was not applied."""

    @property
    def unclipped(self) -> Tensor:
        """Factor from the clipped gradients to those before, float64."""


class GradientClipper:
    """Computes the norm over one replica of the model and scales the gradients; `norm` is the last one.

    Where gradients are not finite, `skipped` is true and every rank leaves its weights and state unchanged, as
    DeepSpeed does at ZeRO 1 to 3. Fused optimizers read that flag on the device; for others the host reads it and drops
    the gradients. factor: scale of the last gradients. grads_are_unreduced: each data-parallel rank has a gradient of
    its own, which is not all-reduced; the norm is then the root mean square of theirs, so that all are scaled alike.
    """

    def __init__(self, parameters: Iterable[Parameter], topology: Topology, max_norm: float) -> None:
        """Creates the clipper. max_norm: largest norm that is not scaled; 0 never scales."""
        self._held = list(parameters)
        self._parameters = [parameter for parameter in self._held if parameter.requires_grad]
        self._counted = [parameter for parameter in self._parameters if counts_here(parameter, topology)]
        self._replica, self._expert = topology.model_parallel, topology.expert
        self._spread = [parameter for parameter in self._counted if expert_rank_and_size(parameter)[1] > 1]
        self._counted = [parameter for parameter in self._counted if expert_rank_and_size(parameter)[1] == 1]
        self._apart = topology.dp_cp
        self._partial = sum_at_step(self._parameters)
        self._fused: torch.optim.Optimizer | None = None
        self.grads_are_unreduced = False
        self._max_norm = max_norm
        self.norm = torch.zeros(())
        self.factor = torch.ones(())
        self.skipped = torch.zeros((), dtype=torch.bool)

    @property
    def unclipped(self) -> Tensor:
        """Factor from the clipped gradients to those before, float64."""
        return 1.0 / self.factor.double()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips before every step of the optimizer."""
        self._fused = optimizer if skips_on_device(optimizer) else None
        optimizer.register_step_pre_hook(lambda *_: self.clip())

    def clip(self) -> None:
        """Sums partial gradients, computes `norm`, the same on every rank of the replica, and clips in place."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if self._parameters and not gradients:
            return  # the same on all ranks; a rank without trainable parameters takes part in the sums
        sum_together([(one.grad, axis) for one, axis in self._partial if one.grad is not None])
        self.norm = self._total().sqrt()
        self.skipped = ~torch.isfinite(self.norm)
        self.factor = torch.ones_like(self.norm)
        if self._fused is not None:
            set_skip(self._fused, self.skipped)
        elif bool(self.skipped):
            for parameter in self._parameters:
                parameter.grad = None  # optimizers skip a parameter without a gradient
            return
        if self._max_norm > 0:
            self.factor = torch.clamp(self._max_norm / (self.norm + 1e-6), max=1.0)
            if gradients:
                torch._foreach_mul_(gradients, self.factor)

    def _total(self) -> Tensor:
        """Returns the squared norm over the replica."""
        device = self._held[0].device
        square = _square(self._counted, device)
        if self._expert.size > 1:
            spread = _square(self._spread, device)
            dist.all_reduce(spread, group=self._expert.group)
            square = square + spread
        if self._replica.size > 1:
            dist.all_reduce(square, group=self._replica.group)
        if self.grads_are_unreduced and self._apart.size > 1:
            dist.all_reduce(square, group=self._apart.group)
            square /= self._apart.size
        return square


def _square(parameters: Iterable[Parameter], device: torch.device) -> Tensor:
    """Returns the squared norm of the gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).square() if gradients else torch.zeros((), device=device)


def counts_here(parameter: Parameter, topology: Topology) -> bool:
    """Returns whether the norm counts this rank's copy of the parameter."""
    if is_tied(parameter) and not topology.pipe.is_first:
        return False
    return is_sharded(parameter) or topology.model.is_first
