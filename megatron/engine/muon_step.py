"""The step of DeepSpeed's bfloat16 optimizer around Muon: gradients of whole matrices go to the ranks that own them.

DeepSpeed accumulates fp32 gradients, and averages those of all parameters that are no matrices, whose fp32 copies stay
its flat partitions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import all_gather_dp_groups
from torch import Tensor

from megatron.distributed.mesh import Topology
from megatron.distributed.param_attrs import expert_rank_and_size
from megatron.engine.bf16_step import Bf16Step
from megatron.optim.grad_clip import counts_here
from megatron.optim.master_muon import MasterMuon


class MuonStep(Bf16Step):
    """Takes the place of the optimizer's `step`; norm, skipped and unclipped are those of the last one."""

    def __init__(self, optimizer: Any, topology: Topology) -> None:
        """Replaces the partitions of matrices by whole matrices; collective.

        Args:
            optimizer: DeepSpeed's bfloat16 optimizer around MasterMuon.
            topology: Layout of the ranks.
        """
        super().__init__(optimizer)
        self._topology, self._muon = topology, optimizer.optimizer
        assert isinstance(self._muon, MasterMuon)
        matrices = range(self._muon.matrix_groups)
        self._others = range(len(matrices), len(optimizer.bf16_groups))
        self._counted = [
            (gradient, expert_rank_and_size(parameter)[1] > 1)
            for index in self._others
            for parameter, gradient in zip(
                optimizer.bf16_groups[index], optimizer.fp32_groups_gradients[index], strict=True
            )
            if counts_here(parameter, topology)
        ]
        self._muon.take_over(
            [
                (
                    optimizer.bf16_groups[index],
                    optimizer.bf16_groups_flat[index],
                    optimizer.fp32_groups_gradients_flat[index],
                )
                for index in matrices
            ]
        )
        for index in matrices:
            optimizer.fp32_groups_flat_partition[index] = torch.empty(
                0, device=optimizer.bf16_groups_flat[index].device
            )
            for parameter in optimizer.bf16_groups[index]:
                parameter._hp_mapping = None
        optimizer.get_grads_for_reduction = self._reduced_by_deepspeed

    @torch.no_grad()
    def __call__(self, closure: None = None) -> None:
        """Clips the gradients and updates the weights, where the gradient norm is finite on all ranks."""
        zero = self._optimizer
        self._sum_partial()
        for owned in self._muon.owned:
            owned.reduce_gradients()
        norm = self._total_norm()
        self.skipped = ~torch.isfinite(norm)
        self.norm = norm.masked_fill(self.skipped, float("inf"))
        zero._global_grad_norm = self.norm
        if not bool(self.skipped):  # the iterations cannot be left out on the device
            self._update(torch.clamp(zero.clip_grad / (norm + 1e-6), max=1.0) if zero.clip_grad > 0 else None)
        for master in self._masters():
            master.grad = None
        zero.clear_hp_grads()

    def _update(self, factor: Tensor | None) -> None:
        """Steps and sends the new weights to all ranks. factor: of clipping; None without it."""
        zero = self._optimizer
        for index in self._others:
            zero.fp32_groups_flat_partition[index].grad = zero.fp32_groups_gradient_flat_partition[index]
        gradients = [one.grad for one in self._masters() if one.grad is not None]
        gradients += [zero.fp32_groups_gradient_flat_partition[index] for index in self._others]
        if factor is not None and gradients:
            torch._foreach_mul_(gradients, factor)
        zero.optimizer.step()
        self.send_weights()

    @torch.no_grad()
    def send_weights(self) -> None:
        """Rounds the fp32 copies and sends them to all ranks; collective."""
        zero = self._optimizer
        for index in self._others:
            rank = dist.get_rank(group=zero.real_dp_process_group[index])
            zero.bf16_partitioned_groups[index][rank].copy_(zero.fp32_groups_flat_partition[index])
        for owned in self._muon.owned:
            owned.send_weights()
        all_gather_dp_groups(
            groups_flat=[zero.bf16_groups_flat[index] for index in self._others],
            partitioned_param_groups=[zero.bf16_partitioned_groups[index] for index in self._others],
            dp_process_group=[zero.real_dp_process_group[index] for index in self._others],
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )

    def _masters(self) -> list[torch.nn.Parameter]:
        return [master for owned in self._muon.owned for master in owned.masters]

    def _total_norm(self) -> Tensor:
        """Returns the gradient norm, the same on every rank of the replica."""
        topology, device = self._topology, self._optimizer.bf16_groups_flat[0].device
        apart = _square([one.grad for one in self._masters() if one.grad is not None], device)  # on this rank alone
        if topology.dp_cp.size > 1:
            dist.all_reduce(apart, group=topology.dp_cp.group)
        spread = _square([gradient for gradient, by_expert in self._counted if by_expert], device)
        if topology.expert.size > 1:
            dist.all_reduce(spread, group=topology.expert.group)
        square = apart + spread + _square([gradient for gradient, by_expert in self._counted if not by_expert], device)
        if topology.model_parallel.size > 1:
            dist.all_reduce(square, group=topology.model_parallel.group)
        return square.sqrt()

    def _reduced_by_deepspeed(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Returns the flat gradients that DeepSpeed averages over data-parallel ranks: those of no matrices."""
        zero, plain = self._optimizer, []
        experts: dict[str, list[Tensor]] = {}
        for index in self._others:
            flat = zero.fp32_groups_gradients_flat[index]
            group = zero.optimizer.param_groups[index]
            if zero.has_moe_layers and group.get("moe"):
                experts.setdefault(group["name"], []).append(flat)
            else:
                plain.append(flat)
        return plain, experts


def _square(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Returns the squared norm of tensors, fp32."""
    return torch.nn.utils.get_total_norm(gradients).float().square() if gradients else torch.zeros((), device=device)
