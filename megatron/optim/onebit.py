"""1-bit Adam (arXiv:2102.02888, algorithm 1): data-parallel ranks communicate one bit a weight instead of gradients.

Up to `freeze_step` this is AdamW. Then the second moment is frozen and gradients are no longer all-reduced: each rank
adds its own gradient to the momentum, and the momenta are averaged through two error-feedback compressions, one by
each worker and one by the server of a chunk of the tensor. The error of a compression is added to the next.

A compressed tensor is one sign an element and one magnitude a row: the mean of the row's absolute values. (The paper
has one magnitude a tensor. Rows of rare tokens have a small second moment, and a step as large as that of common ones
would make them diverge.) Elements that never had a gradient have a second moment of zero and do not change. Magnitudes
are means over the rows of the full tensor, so tensor and pipeline parallelism change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

from megatron.distributed.mesh import Topology
from megatron.log import get_logger
from megatron.optim.adam import BETAS, EPS
from megatron.optim.builder_args import STEP, Groups, OptimizerArgs
from megatron.optim.compressed_allreduce import CommBytes, CompressedAllReduce

FREEZE_STEP = 100_000
WORKER_ERROR, SERVER_ERROR = "worker_error", "server_error"

_log = get_logger(__name__)


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds 1-bit Adam over the ranks that sum gradients. freeze_step [steps]: 100,000 unless set, as in DeepSpeed."""
    return OnebitAdam(
        groups,
        lr=args.lr,
        betas=args.betas(BETAS),
        eps=args.number("eps", EPS),
        freeze_step=int(args.number("freeze_step", FREEZE_STEP)),
        topology=args.topology,
    )


class OnebitAdam(torch.optim.Optimizer):
    """AdamW that switches to compressed momenta after `freeze_step` updates.

    on_freeze: called once gradients need no all-reduce any more, also when a later checkpoint is loaded. comm_bytes:
    bytes that this rank has sent in compressed steps, and what an all-reduce of fp32 gradients would have sent.

    Args:
        groups: Parameter groups.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        freeze_step: Number of uncompressed updates.
        topology: Axes of this rank.
    """

    def __init__(
        self,
        groups: Groups,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        freeze_step: int,
        topology: Topology,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self._warm = torch.optim.AdamW(self.param_groups, lr=lr, betas=betas, eps=eps, fused=True)
        self._warm.state = self.state
        self._warm.param_groups = self.param_groups
        self._freeze_step = freeze_step
        self._exchange: CompressedAllReduce | None = None
        self._topology = topology
        self.comm_bytes = CommBytes()
        self.on_freeze: Callable[[], None] = lambda: None

    @property
    def compressing(self) -> bool:
        """Returns whether the next step expects gradients that are not all-reduced over data-parallel ranks."""
        return self._updates() >= self._freeze_step

    @property
    def data_rank(self) -> int:
        """Index of this rank's worker error."""
        return self._topology.dp_cp.rank

    @property
    def data_size(self) -> int:
        """Number of ranks that average their momenta."""
        return self._topology.dp_cp.size

    def server_range(self, parameter: Parameter) -> tuple[int, int]:
        """Returns the elements of the flattened shard that this rank serves: start, stop."""
        return CompressedAllReduce.chunk(parameter, self._topology.dp_cp)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Updates the parameters from their gradients."""
        assert closure is None, "closures are not supported"
        if self.compressing:
            self._compressed_step()
            return
        self._warm.step()
        if self.compressing:
            self.resume()
            _log.info("1-bit Adam: %d steps are done, momenta are exchanged as signs from now on", self._freeze_step)

    def resume(self) -> None:
        """Continues compression if the state shows that it has begun."""
        if self.compressing:
            self.on_freeze()

    def _updates(self) -> int:
        counts = (self.state[p][STEP] for group in self.param_groups for p in group["params"] if p in self.state)
        return int(next(counts, 0))

    def _compressed_step(self) -> None:
        updates = self._updates() + 1
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        if self._exchange is None:
            live = {parameter: self.state[parameter]["exp_avg_sq"] > 0 for parameter in parameters}
            self._exchange = CompressedAllReduce(live, self._topology, self.comm_bytes)
        beta1 = self.param_groups[0]["betas"][0]
        momenta = {}
        for parameter in parameters:
            state = self.state[parameter]
            self._ready(parameter, state)
            assert parameter.grad is not None, "chosen by that"
            state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
            momenta[parameter] = state["exp_avg"]
        errors = {p: (self.state[p][WORKER_ERROR], self.state[p][SERVER_ERROR]) for p in parameters}
        self._exchange.average(momenta, errors)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._apply(group, parameter, updates)

    def _ready(self, parameter: Parameter, state: dict[str, Any]) -> None:
        start, stop = self.server_range(parameter)
        if WORKER_ERROR not in state:
            state[WORKER_ERROR] = torch.zeros_like(state["exp_avg"])
        if SERVER_ERROR not in state:
            state[SERVER_ERROR] = state["exp_avg"].new_zeros(stop - start)

    def _apply(self, group: dict[str, Any], parameter: Parameter, updates: int) -> None:
        """Applies Adam's update with the frozen second moment and its bias correction."""
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        second = math.sqrt(1 - beta2 ** min(updates, self._freeze_step)) if self._freeze_step else 1.0
        denominator = (state["exp_avg_sq"].sqrt() / second).add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**updates))
        state[STEP] += 1
