"""Metrics of a training report by their public names: a new metric of the step is one line here.

Metrics that something else observes come from a hook (`megatron/training/hooks/base.py`, `metrics`).
"""

from __future__ import annotations

from collections.abc import Mapping


def step_metrics(
    *,
    loss: float | None,
    learning_rate: float,
    grad_norm: float,
    loss_scale: float,
    more: Mapping[str, float],
    consumed_tokens: int,
    seconds: float,
    tokens: float,
    flops: float,
    peak_flops: float,
    peak_memory_bytes: float,
) -> dict[str, float]:
    """Return the metrics of the steps since the last report; reporter.py lists their units.

    Args:
        loss: Mean loss of the steps [nats per token]; None where no token had a label, which reports none.
        learning_rate: Learning rate of the last step.
        grad_norm: Gradient norm of the last step, before clipping.
        loss_scale: Loss scale of the last step.
        more: Further values of the last step, such as losses of the router.
        consumed_tokens: Tokens of the run so far, over all ranks.
        seconds: Time of a step [s].
        tokens: Tokens of a step, over all ranks.
        flops: Model FLOPs of a step on one device, without recomputation [FLOP].
        peak_flops: Dense peak of a device [FLOP/s]; 0 reports no utilization (MFU).
        peak_memory_bytes: Largest memory of a rank [bytes].
    """
    flops_per_second = flops / seconds
    metrics = {} if loss is None else {"train/lm_loss": loss}
    metrics |= {
        "train/learning_rate": learning_rate,
        "train/grad_norm": grad_norm,
        "train/loss_scale": loss_scale,
        "consumed_tokens": float(consumed_tokens),
        "runtime/iteration_time": seconds,
        "runtime/tokens_per_sec": tokens / seconds,
        "runtime/flops_per_sec_per_gpu": flops_per_second,
        "runtime/peak_memory_bytes": peak_memory_bytes,
    }
    metrics |= {f"train/{name}": value for name, value in more.items()}
    if peak_flops > 0:
        metrics["runtime/model_flops_utilization"] = flops_per_second / peak_flops
    return metrics
