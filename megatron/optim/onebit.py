"""1-bit Adam (arXiv:2102.02888, algorithm 1): data-parallel ranks exchange one bit a weight in place of a gradient.

Up to `freeze_step` this is AdamW. Then the second moment stands still and gradients are no longer summed: each rank
adds its own gradient to the momentum, and the momenta are averaged through two error-feedback compressions, one by
each worker and one by the rank that serves a chunk of the tensor. What a compression leaves out is added to the next.

A compressed tensor is one sign an element and one magnitude a row: the mean of the row's absolute values. (The paper
has one magnitude a tensor. Rows of rare tokens have a small second moment, and a step as large as that of common ones
would throw them out.) Elements that never saw a gradient have a second moment of zero and stay as they are. Magnitudes
are means over the rows of the whole tensor, so tensor and pipeline parallelism change nothing.
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
from megatron.optim.builder_args import STEP, Groups, Request
from megatron.optim.compressed_allreduce import CommBytes, Exchange

FREEZE_STEP = 100_000
WORKER_ERROR, SERVER_ERROR = "worker_error", "server_error"

_log = get_logger(__name__)


def build(groups: Groups, request: Request) -> torch.optim.Optimizer:
    """1-bit Adam over the ranks that sum gradients. freeze_step [steps]: 100,000, as DeepSpeed's had, unless given."""
    return OnebitAdam(
        groups,
        lr=request.lr,
        betas=request.betas(BETAS),
        eps=request.number("eps", EPS),
        freeze_step=int(request.number("freeze_step", FREEZE_STEP)),
        topology=request.topology,
    )


class OnebitAdam(torch.optim.Optimizer):
    """AdamW that turns to compressed momenta after `freeze_step` updates.

    on_freeze: called once gradients need no summing any more, also when a checkpoint from after that point is loaded.
    traffic: bytes that this rank has sent in compressed steps, and what summing fp32 gradients would have sent.
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
        self._exchange: Exchange | None = None
        self._topology = topology
        self.traffic = CommBytes()
        self.on_freeze: Callable[[], None] = lambda: None

    @property
    def compressing(self) -> bool:
        """Whether the next step expects gradients that are not summed over data-parallel ranks."""
        return self._updates() >= self._freeze_step

    @property
    def data_rank(self) -> int:
        """Whose worker error this is."""
        return self._topology.dp_cp.rank

    @property
    def data_size(self) -> int:
        """How many ranks average their momenta."""
        return self._topology.dp_cp.size

    def server_range(self, parameter: Parameter) -> tuple[int, int]:
        """The elements of the flattened shard that this rank serves: start, stop."""
        return Exchange.chunk(parameter, self._topology.dp_cp)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update from the gradients that are in the parameters."""
        assert closure is None, "nobody computes gradients in here"
        if self.compressing:
            self._compressed_step()
            return
        self._warm.step()
        if self.compressing:
            self.resume()
            _log.info("1-bit Adam: %d steps are done, momenta are exchanged as signs from now on", self._freeze_step)

    def resume(self) -> None:
        """Takes up compression where the state says that it has begun."""
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
            self._exchange = Exchange(live, self._topology, self.traffic)
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
        """Adam's update with a second moment, and its correction, from the step at which it was frozen."""
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        second = math.sqrt(1 - beta2 ** min(updates, self._freeze_step)) if self._freeze_step else 1.0
        denominator = (state["exp_avg_sq"].sqrt() / second).add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**updates))
        state[STEP] += 1
