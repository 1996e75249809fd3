"""Changes gradient accumulation between steps (batch size ramp-up)."""

from __future__ import annotations

from typing import Any


def set_grad_accumulation(deepspeed: Any, micro_batches: int) -> None:
    """Sets the number of micro batches of a step; must be called between steps.

    DeepSpeed finds the end of a step by counting all micro batches so far, so the count is reset.
    """
    if deepspeed.gradient_accumulation_steps() == micro_batches:
        return
    ranks = deepspeed.train_batch_size() // (
        deepspeed.train_micro_batch_size_per_gpu() * deepspeed.gradient_accumulation_steps()
    )
    deepspeed.set_train_batch_size(deepspeed.train_micro_batch_size_per_gpu() * micro_batches * ranks)
    deepspeed.micro_steps = 0
    if hasattr(deepspeed.optimizer, "gradient_accumulation_steps"):
        deepspeed.optimizer.gradient_accumulation_steps = micro_batches
