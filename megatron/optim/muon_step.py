"""Muon's step where it is not that of torch: iterations of a kernel, or weights that consist of several matrices.

Momentum and state are those of torch.optim.Muon: one momentum of the weight's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.kernels.newton_schulz import Iterations
from megatron.optim.muon_pieces import Pieces, pieces_of

MOMENTUM = "momentum_buffer"


@dataclass(frozen=True)
class MuonOptions:
    """What of Muon's step torch's does not have."""

    split_experts: bool = False
    """True if the experts of a stack are orthogonalized apart."""

    @property
    def are_default(self) -> bool:
        """Returns whether torch's step is asked for."""
        return self == MuonOptions()


class PieceMuon(torch.optim.Muon):
    """torch's Muon with other iterations, over the matrices of each weight. Its state is the same."""

    def __init__(self, iterations: Iterations, options: MuonOptions, groups: Any, **settings: Any) -> None:
        """Creates the optimizer.

        Args:
            iterations: Newton-Schulz iterations.
            options: What differs from torch's step.
            groups: Parameter groups of full weights.
            settings: Arguments of torch.optim.Muon.
        """
        super().__init__(groups, **settings)
        self._iterations, self._options = iterations, options
        self._pieces: dict[Parameter, Pieces] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Updates the weights that have gradients."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(gradient)
        momentum = state[MOMENTUM].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        pieces = self._pieces_of(parameter)
        parts = [
            self._iterations(part, group["ns_steps"]).to(parameter.dtype).mul_(_scale(part, group["adjust_lr_fn"]))
            for part in pieces.split(update)
        ]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(pieces.join(parts), alpha=-group["lr"])

    def _pieces_of(self, parameter: Parameter) -> Pieces:
        if parameter not in self._pieces:
            self._pieces[parameter] = pieces_of(parameter, experts=self._options.split_experts)
        return self._pieces[parameter]


def _scale(part: Tensor, rule: str) -> float:
    """Returns the factor of a matrix's step. rule: adjust_lr_fn of torch.optim.Muon."""
    rows, columns = part.shape[-2:]
    matched = rule == "match_rms_adamw"
    return float(0.2 * max(rows, columns) ** 0.5 if matched else max(1.0, rows / columns) ** 0.5)
