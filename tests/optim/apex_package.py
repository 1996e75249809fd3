"""A stand-in for NVIDIA Apex's FusedAdam: its arguments and its state, computed by formulas.

As in Apex, updates are counted in the parameter group, and zero_grad takes no argument.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.nn import Parameter


class FusedAdam(torch.optim.Optimizer):
    """Apex's arguments and state, computed by formulas."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        assert not (amsgrad or capturable or master_weights)
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        self.adam_w_mode, self.set_grad_none = int(adam_w_mode), set_grad_none
        self._step_supports_amp_scaling = True

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        grads: Any = None,
        output_params: Any = None,
        scale: Any = None,
        grad_norms: Any = None,
        grad_scaler: Any = None,
    ) -> Any:
        assert all(each is None for each in (closure, grads, output_params, scale, grad_norms, grad_scaler))
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group)

    def _update(self, parameter: Parameter, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if len(state) == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        if not self.adam_w_mode:
            gradient = gradient + group["weight_decay"] * parameter
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].lerp_(gradient**2, 1 - second)
        corrects = group["bias_correction"]
        c1, c2 = (1 - first ** group["step"], 1 - second ** group["step"]) if corrects else (1.0, 1.0)
        update = (state["exp_avg"] / c1) / ((state["exp_avg_sq"] / c2).sqrt() + group["eps"])
        if self.adam_w_mode:
            update += group["weight_decay"] * parameter
        parameter.sub_(group["lr"] * update)


def modules() -> dict[str, ModuleType]:
    """The modules of the package, for sys.modules."""
    optimizers = ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    return {"apex": ModuleType("apex"), "apex.optimizers": optimizers}
