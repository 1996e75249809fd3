"""Muon over the fp32 copies of matrices that are owned by single ranks, AdamW over ZeRO's flat partitions of the rest.

DeepSpeed's bfloat16 optimizer is built around this one, and lays the weights and gradients of each group out in flat
buffers. `take_over` then replaces its partitions of the matrices by whole ones (`owned_matrices.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.distributed.mesh import Topology
from megatron.optim.builder_args import Groups
from megatron.optim.owned_matrices import OwnedMatrices, assign_owners, by_owner, data_axis
from megatron.optim.qk_clip import QKClip
from megatron.optim.unsharded import AssignedTensor, OptimizerFactory


class MasterMuon(torch.optim.Optimizer):
    """Steps the matrices that this rank owns, and its partitions of everything else.

    assigned: matrix in bfloat16 -> its owner, and its fp32 copy there. clip: scales fp32 copies after an update; None
    does not.
    """

    def __init__(
        self, matrices: Groups, others: Groups, muon: OptimizerFactory, adam: OptimizerFactory, topology: Topology
    ) -> None:
        """Assigns owners. The optimizers are built by `take_over`.

        Args:
            matrices: Parameter groups of matrices.
            others: All other parameter groups.
            muon: Builds the optimizer of matrices.
            adam: Builds the optimizer of the others.
            topology: Layout of the ranks.
        """
        listed = [parameter for group in matrices for parameter in group["params"]]
        self._owners = assign_owners(listed, topology)
        sorted_ = [{**group, "params": by_owner(group["params"], self._owners)} for group in matrices]
        super().__init__([*sorted_, *others], {})
        self._topology, self._muon, self._adam = topology, muon, adam
        self._inner: list[tuple[torch.optim.Optimizer, list[dict[str, Any]]]] = []
        self.clip: QKClip | None = None
        self.matrix_groups = len(matrices)
        self.owned: list[OwnedMatrices] = []
        self.assigned: dict[Parameter, AssignedTensor] = {}

    def take_over(self, buffers: Sequence[tuple[list[Parameter], Tensor, Tensor]]) -> None:
        """Makes fp32 copies of whole matrices, and the optimizers. Collective.

        Args:
            buffers: Weights of each matrix group, the flat buffer that they are views of, and that of their gradients.
        """
        groups = self.param_groups[: self.matrix_groups]
        for group, (weights, flat, gradients) in zip(groups, buffers, strict=True):
            data, model = data_axis(weights[0], self._topology), self._topology.model
            found = OwnedMatrices(weights, self._owners, flat, gradients, data, model, self._topology.dp_cp.size)
            self.owned.append(found)
            self.assigned |= found.assigned
            group["params"] = found.masters
        self._add(self._muon, groups)
        self._add(self._adam, self.param_groups[self.matrix_groups :])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Updates fp32 copies and partitions."""
        assert closure is None, "closures are not supported"
        for optimizer, outer_groups in self._inner:
            for group, outer in zip(optimizer.param_groups, outer_groups, strict=True):
                group["lr"] = outer["lr"]
            optimizer.step()
        if self.clip is not None:
            self.clip(self._full_tensor)

    def _full_tensor(self, parameter: Parameter) -> Tensor | None:
        full = self.assigned[parameter].full
        return None if full is None else full.detach()

    def _add(self, factory: OptimizerFactory, groups: list[dict[str, Any]]) -> None:
        filled = [group for group in groups if group["params"]]
        if filled:
            optimizer = factory([dict(group) for group in filled])
            optimizer.state = self.state
            self._inner.append((optimizer, filled))
            for group in groups:
                group.setdefault("lr", optimizer.defaults["lr"])
