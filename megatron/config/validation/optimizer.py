"""Rules about which optimizer can work in which layout."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.errors import ConfigIssue
from megatron.registry import EIGHT_BIT, OPTIMIZERS


def whole_tensors_need_no_zero(config: Config) -> Iterator[ConfigIssue]:
    """ZeRO cuts parameters into flat pieces, which have no rows and columns."""
    kind, stage = config.optimizer.optimizer_type, config.deepspeed.zero_stage
    traits = OPTIMIZERS.entry(kind).traits
    if "whole" not in traits:
        return
    if "pieces" in traits and config.precision.precision == "bfloat16":
        yield from _matrices_from_pieces(config)
        return
    if not _asked_for_pieces(config):
        return
    yield ConfigIssue(
        f"{kind} looks at the rows and columns of a matrix, and ZeRO stage {stage} makes flat pieces of it",
        key="optimizer",
        value=config.optimizer.optimizer,
        hint="use zero_optimization: {stage: 0}, or adam, lion or sgd",
    )


def _asked_for_pieces(config: Config) -> bool:
    """Whether ZeRO was chosen. In 16 bits stage 1 stands for 0 too, and precision is what to change."""
    stage = config.deepspeed.zero_stage
    return stage not in (0, None) and not (stage == 1 and config.precision.precision != "fp32")


def _matrices_from_pieces(config: Config) -> Iterator[ConfigIssue]:
    """DeepSpeed's Muon puts matrices together from the pieces of ZeRO 1 in bfloat16, over data-parallel ranks alone."""
    axes, observe, value = config.parallelism, config.observe, config.optimizer.optimizer
    cut = axes.model_parallel_size > 1 or axes.context_parallel_size > 1 or axes.pipe_parallel_size > 0
    accumulate = (config.precision.data_types or {}).get("grad_accum_dtype")
    if config.deepspeed.zero_stage != 1 or cut or accumulate != "fp32":
        yield ConfigIssue(
            "in bfloat16 DeepSpeed's muon needs ZeRO stage 1, gradients summed in fp32, and data parallelism alone",
            key="optimizer",
            value=value,
            hint="set pipe_parallel_size: 0, model_parallel_size: 1 and zero_optimization: {stage: 1}, or use fp32",
        )
    if config.optimizer.params.get("adjust_lr_fn") != "original" or config.optimizer.params.get("nesterov") is False:
        yield ConfigIssue(
            "in bfloat16 DeepSpeed's muon scales a step by sqrt(max(1, rows/columns)) and looks ahead",
            key="optimizer",
            value=value,
            hint="write adjust_lr_fn: original and leave nesterov out, or use fp32",
        )
    if observe.log_grad_norm or observe.log_grad_pct_zeros or observe.log_gradient_noise_scale:
        yield ConfigIssue(
            "DeepSpeed's muon has made updates of the gradients before anyone can look at them",
            key="optimizer",
            value=value,
            hint="leave log_grad_norm, log_grad_pct_zeros and log_gradient_noise_scale out",
        )


def momenta_are_exchanged_once(config: Config) -> Iterator[ConfigIssue]:
    """1-bit Adam sums no gradients, which ZeRO does as they arrive, and keeps fp32 momenta."""
    kind, stage = config.optimizer.optimizer_type, config.deepspeed.zero_stage
    if "local" in OPTIMIZERS.entry(kind).traits and _asked_for_pieces(config):
        yield ConfigIssue(
            f"{kind} exchanges momenta in place of gradients, and ZeRO stage {stage} sums gradients",
            key="optimizer",
            value=config.optimizer.optimizer,
            hint="use zero_optimization: {stage: 0}, or adam",
        )


def pieces_need_full_precision(config: Config) -> Iterator[ConfigIssue]:
    """DeepSpeed keeps the fp32 copies of low-precision weights as flat pieces."""
    kind, precision = config.optimizer.optimizer_type, config.precision.precision
    traits = OPTIMIZERS.entry(kind).traits
    if "pieces" in traits and precision == "bfloat16" and config.deepspeed.zero_stage == 1:
        return  # DeepSpeed's own form of it
    if traits & {"whole", "local"} and precision != "fp32":
        yield ConfigIssue(
            f"{kind} works on whole fp32 tensors, and DeepSpeed makes flat fp32 copies of {precision} weights",
            key="precision",
            value=precision,
            hint="use precision: fp32, or adam, lion or sgd",
        )


def spread_experts_are_pieces(config: Config) -> Iterator[ConfigIssue]:
    """Ranks that share the experts each hold a part of a stack, and sum the gradients of that part themselves."""
    kind, spread = config.optimizer.optimizer_type, config.moe.moe_expert_parallel_size
    if OPTIMIZERS.entry(kind).traits & {"whole", "local"} and config.moe.moe_num_experts > 1 and spread > 1:
        yield ConfigIssue(
            f"{kind} works on whole tensors and all data-parallel ranks, and experts are spread over ranks",
            key="moe_expert_parallel_size",
            value=spread,
            hint="use 1, or adam, lion or sgd",
        )


def host_memory_holds_parameters(config: Config) -> Iterator[ConfigIssue]:
    """An optimizer for the host's processor needs parameters, or copies of them, in the host's memory."""
    kind = config.optimizer.optimizer_type
    if "host" not in OPTIMIZERS.entry(kind).traits or config.launch.distributed_backend != "nccl":
        return
    offload = (config.deepspeed.zero_optimization or {}).get("offload_optimizer") or {}
    if offload.get("device") != "cpu":
        yield ConfigIssue(
            f"{kind} updates in the host's memory, and the parameters are on the GPU",
            key="optimizer",
            value=config.optimizer.optimizer,
            hint="add offload_optimizer: {device: cpu} to zero_optimization, or use adam",
        )


def eight_bits_are_built(config: Config) -> Iterator[ConfigIssue]:
    """Not every optimizer has a form whose state has eight bits."""
    kind = config.optimizer.optimizer_type
    if not config.optimizer.use_bnb_optimizer:
        return
    if kind not in EIGHT_BIT:
        hint = f"use one of {', '.join(EIGHT_BIT.names)}, or leave it out"
        yield ConfigIssue(f"bitsandbytes has no {kind}", key="use_bnb_optimizer", value=True, hint=hint)
        return
    further = sorted(set(config.optimizer.params) & set(OPTIMIZERS.entry(kind).settings))
    unknown = [name for name in further if name not in EIGHT_BIT.entry(kind).settings]
    if unknown:
        yield ConfigIssue(
            f"the 8-bit {kind} has no parameter {', '.join(unknown)}",
            key="optimizer",
            value=config.optimizer.optimizer,
            hint="leave it out, or leave use_bnb_optimizer out",
        )


def nesterov_needs_momentum(config: Config) -> Iterator[ConfigIssue]:
    """Nesterov's step looks ahead along a momentum."""
    params = config.optimizer.params
    dampens = "dampening" in OPTIMIZERS.entry(config.optimizer.optimizer_type).settings
    looks_ahead = dampens and params.get("nesterov")
    if looks_ahead and (not params.get("momentum") or params.get("dampening")):
        yield ConfigIssue(
            "nesterov needs a momentum and no dampening",
            key="optimizer",
            value=config.optimizer.optimizer,
            hint="add momentum: 0.9",
        )
