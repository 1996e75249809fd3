"""Leaves out updates from losses that are outliers: far above the mean of the steps before.

A loss is an outlier where it exceeds the mean of the last `window` steps by more than `factor` standard deviations;
there is none before half of the window is filled. The backward pass of the last micro batch then starts from NaN: the
gradients are not finite, and the optimizer leaves the update out on all ranks, as it does after any such gradient.
Only the rank of the last pipeline stage knows the loss in time; all ranks know it after the step.

Source: OLMo-core, optim/skip_step_optimizer.py (window 128, 6 standard deviations).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_PREFIX = "loss_before_"
"""Of the names of losses in a checkpoint."""


class OutlierSteps:
    """The losses of the last steps, fp64 on the device, and what they say of the next one."""

    def __init__(self, factor: float, window: int, device: torch.device) -> None:
        """Creates an empty history.

        Args:
            factor: Standard deviations above the mean from which on a loss is an outlier.
            window: Number of losses that the mean is over.
            device: Device of the losses.
        """
        self._factor, self._window = factor, window
        self._losses = torch.empty(0, dtype=torch.float64, device=device)
        self._micro_batches, self._seen = 1, 0
        self._total = torch.zeros((), device=device)
        self._mean: Callable[[Tensor], Tensor] = torch.Tensor.clone

    def limit(self) -> Tensor:
        """Returns the loss above which the coming step is an outlier, infinite before half of the window is filled."""
        if len(self._losses) < max(2, self._window // 2):
            return torch.full((), torch.inf, dtype=torch.float64, device=self._losses.device)
        std, mean = torch.std_mean(self._losses)
        return mean + self._factor * std

    def begin(self, micro_batches: int, mean: Callable[[Tensor], Tensor]) -> None:
        """Begins a step.

        Args:
            micro_batches: Micro batches of this rank.
            mean: Sum of this rank's losses -> the loss of the step, the same on all ranks; collective.
        """
        self._micro_batches, self._seen, self._mean = micro_batches, 0, mean
        self._total = torch.zeros_like(self._total)

    def __call__(self, loss: Tensor) -> Tensor:
        """Adds the loss of a micro batch, and returns it; that of the last one gets the gradient NaN in an outlier."""
        self._seen += 1
        self._total = self._total + loss.detach()
        if self._seen == self._micro_batches:
            outlier = self._mean(self._total).double() > self.limit()
            factor = torch.where(outlier, torch.nan, 1.0).to(loss.dtype)
            loss.register_hook(lambda gradient: gradient * factor)
        return loss

    def end(self, loss: Tensor, skipped: Tensor) -> Tensor:
        """Ends a step; returns whether its update was left out as an outlier, bool.

        Args:
            loss: Loss of the step.
            skipped: Whether its update was left out.
        """
        known = loss.detach().double().to(self._losses.device)
        limit = self.limit()
        outlier = skipped.to(limit.device) & (known > limit - 1e-6 * limit.abs())
        last = self._losses[-1] if len(self._losses) else torch.zeros_like(known)
        usable = known.isfinite() & (known != 0)  # 0 is of a batch without a label
        finite = torch.where(usable, known, last)
        self._losses = torch.cat([self._losses, finite.view(1)])[-self._window :]
        return outlier

    def numbers(self) -> dict[str, float]:
        """Returns the losses for a checkpoint, by name."""
        return {f"{_PREFIX}{index}": loss for index, loss in enumerate(self._losses.tolist())}

    def load_numbers(self, stored: Mapping[str, float]) -> None:
        """Restores the losses; a checkpoint without any starts anew."""
        count = sum(name.startswith(_PREFIX) for name in stored)
        losses = [stored[f"{_PREFIX}{index}"] for index in range(count)][-self._window :]
        self._losses = torch.tensor(losses, dtype=torch.float64, device=self._losses.device)


def outlier_steps(factor: float | None, window: int, device: torch.device) -> OutlierSteps | None:
    """Returns an empty history; None where no update is left out."""
    return None if factor is None else OutlierSteps(factor, window, device)
