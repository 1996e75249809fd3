"""Number formats. `precision` is resolved: fp32, bfloat16 or fp16."""

from megatron.config.field import Section, key
from megatron.config.types import Table


class PrecisionSection(Section):
    """Number formats of parameters, gradients and reductions."""

    precision: str | None = key(
        None,
        "Format of parameters and activations; fp32 when nothing asks otherwise.",
        choices=("fp16", "fp32", "bfloat16"),
    )
    fp16: Table | None = key(
        None,
        "fp16 training: {enabled, loss_scale, loss_scale_window, hysteresis, min_loss_scale, initial_scale_power}.",
    )
    bf16: Table | None = key(None, "bfloat16 training: {enabled}.")
    amp: Table | None = key(None, "Apex mixed precision; removed in DeepSpeed 0.19.")
    fp8: Table | None = key(
        None,
        "Products of attention's and the MLP's linear layers in FP8, in training: "
        "{recipe: tensorwise | rowwise | blockwise}.",
    )
    data_types: Table | None = key(
        None, "Format in which gradients accumulate: {grad_accum_dtype: fp32 | bf16 | fp16}; fp32 for bfloat16."
    )
    fp32_allreduce: bool = key(False, "All-reduce gradients and tensor parallel outputs in fp32.")
    loss_scale: float | None = key(None, "Fixed loss scale; the fp16 block takes precedence.")
    dynamic_loss_scale: bool | None = key(None, "Whether the loss scale is dynamic; follows from loss_scale.")
    loss_scale_window: float = key(1000.0, "Steps without overflow before the loss scale doubles.", unit="steps")
    hysteresis: int = key(2, "Overflows before the loss scale halves.", unit="steps")
    overflow_limit: int = key(
        50, "Steps in a row that may overflow at the least loss scale before the run stops.", unit="steps"
    )
    min_scale: float = key(1.0, "Least dynamic loss scale.")
