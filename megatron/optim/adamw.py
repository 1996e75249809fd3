"""AdamW (arXiv:1711.05101) as torch ships it, fused: one kernel for all parameters, on CPU and on GPU."""

from __future__ import annotations

from typing import Any

import torch


def build(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """An AdamW over parameter groups that name their own weight decay; lr is replaced before every step."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
