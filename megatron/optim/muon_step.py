"""Muon's step where it is not that of torch: iterations of a kernel, or options.

The state of a weight is that of torch.optim.Muon, one momentum of the weight's shape, and with NorMuon a second moment
of each row. NorMuon divides each row of an orthogonalized momentum by the root of its running mean square, and scales
the result to a root mean square of 0.2 (arXiv:2510.05491, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.kernels.newton_schulz import STANDARD, Iterations, coefficients
from megatron.optim.muon_pieces import Pieces, pieces_of

MOMENTUM, ROW_MOMENT = "momentum_buffer", "row_moment"
_MATCHED = 0.2
"""Root mean square of an AdamW step (arXiv:2502.16982, section 2.2)."""
_EPSILON = 1e-8


@dataclass(frozen=True)
class MuonOptions:
    """What of Muon's step torch's does not have."""

    split_experts: bool = False
    """True if the experts of a stack are orthogonalized apart."""
    split_qkv: bool = False
    """True if queries, keys and values are orthogonalized apart."""
    split_heads: bool = False
    """True if every head of queries, keys and values is orthogonalized apart."""
    ns_coefficients: str = STANDARD
    """Coefficients of the iterations."""
    row_beta: float | None = None
    """Decay rate of NorMuon's second moments of rows; None without them."""
    momentum_dtype: torch.dtype = torch.float32
    """Type in which momentum is stored."""

    @property
    def are_default(self) -> bool:
        """Returns whether torch's step is asked for."""
        return self == MuonOptions()


class PieceMuon(torch.optim.Muon):
    """torch's Muon with other iterations, over the matrices of each weight."""

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
        update = self._momentum(parameter, gradient, group)
        pieces = self._pieces_of(parameter)
        found = coefficients(self._options.ns_coefficients, group["ns_steps"])
        parts = [self._iterations(part, found) for part in pieces.split(update)]
        factor = 1.0
        if self._options.row_beta is not None:
            joined = pieces.join([part.to(parameter.dtype) for part in parts])
            normalized = pieces.split(self._by_rows(parameter, joined, self._options.row_beta))
            step = pieces.join([_to_size(part) for part in normalized])
        elif pieces.sizes == ((1, len(parameter)),):
            step = parts[0][0]
            factor = _scale(step, group["adjust_lr_fn"])
        else:
            step = pieces.join([part.to(parameter.dtype) * _scale(part, group["adjust_lr_fn"]) for part in parts])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(step, alpha=-group["lr"] * factor)

    def _momentum(self, parameter: Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Updates the momentum. Returns it, or with Nesterov's look ahead its mean with the gradient."""
        state, dtype = self.state[parameter], self._options.momentum_dtype
        stored = state.get(MOMENTUM)
        if stored is None or stored.dtype != dtype:  # a checkpoint holds fp32
            stored = state[MOMENTUM] = torch.zeros_like(gradient, dtype=dtype) if stored is None else stored.to(dtype)
        momentum = stored.to(gradient.dtype).lerp_(gradient, 1 - group["momentum"])
        if stored.dtype != gradient.dtype:
            stored.copy_(momentum)
        return gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def _by_rows(self, parameter: Parameter, update: Tensor, beta: float) -> Tensor:
        """Divides each row by the root of its running mean square."""
        state = self.state[parameter]
        if ROW_MOMENT not in state:
            state[ROW_MOMENT] = update.new_zeros(update.shape[0], 1)
        moment = state[ROW_MOMENT].lerp_(update.square().mean(1, keepdim=True), 1 - beta)
        return update / (moment.sqrt() + _EPSILON)

    def _pieces_of(self, parameter: Parameter) -> Pieces:
        if parameter not in self._pieces:
            chosen = self._options
            self._pieces[parameter] = pieces_of(
                parameter, experts=chosen.split_experts, qkv=chosen.split_qkv, heads=chosen.split_heads
            )
        return self._pieces[parameter]


def _scale(part: Tensor, rule: str) -> float:
    """Returns the factor of a matrix's step. rule: adjust_lr_fn of torch.optim.Muon."""
    rows, columns = part.shape[-2:]
    matched = rule == "match_rms_adamw"
    return float(_MATCHED * max(rows, columns) ** 0.5 if matched else max(1.0, rows / columns) ** 0.5)


def _to_size(part: Tensor) -> Tensor:
    """Scales each matrix to the root mean square of an AdamW step; zeros stay."""
    size = part.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    return part * (_MATCHED / size.clamp(min=_EPSILON))
