"""Rules for optimizers and the layouts that they work in."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.errors import ConfigIssue
from megatron.registry import EIGHT_BIT, OPTIMIZERS
from megatron.registry.kernels import FUSED_ADAM


def full_tensors_need_no_zero(config: Config) -> Iterator[ConfigIssue]:
    """ZeRO shards parameters as flat tensors, which have no rows and columns."""
    kind, stage = config.optimizer.optimizer_type, config.deepspeed.zero_stage
    traits = OPTIMIZERS.entry(kind).traits
    if "full_tensors" not in traits:
        return
    if "zero1" in traits and config.precision.precision == "bfloat16":
        yield from _zero1_limits_muon(config)
        return
    if not _zero_was_requested(config):
        return
    yield ConfigIssue(
        f"{kind} looks at the rows and columns of a matrix, and ZeRO stage {stage} makes flat shards of it",
        key="optimizer",
        value=config.optimizer.optimizer,
        hint="use zero_optimization: {stage: 0}, or adam, lion or sgd",
    )


def _zero_was_requested(config: Config) -> bool:
    """Returns whether the user chose ZeRO. In 16 bits a stage 0 becomes 1, and precision is the key to change."""
    stage = config.deepspeed.zero_stage
    return stage not in (0, None) and not (stage == 1 and config.precision.precision != "fp32")


def _zero1_limits_muon(config: Config) -> Iterator[ConfigIssue]:
    """In bfloat16 muon replaces DeepSpeed's partitions of fp32 copies, which exist at ZeRO 1 with fp32 gradients."""
    kind, value = config.optimizer.optimizer_type, config.optimizer.optimizer
    accumulate = (config.precision.data_types or {}).get("grad_accum_dtype")
    if config.deepspeed.zero_stage != 1 or accumulate != "fp32":
        yield ConfigIssue(
            f"in bfloat16 {kind} needs ZeRO stage 1 and gradients summed in fp32",
            key="optimizer",
            value=value,
            hint="set zero_optimization: {stage: 1} and leave grad_accum_dtype out, or use fp32",
        )
    if offloads(config):
        yield ConfigIssue(
            f"{kind} updates whole matrices on the model's device, and offload_optimizer flat partitions on the host",
            key="zero_optimization",
            value=config.deepspeed.zero_optimization,
            hint="leave offload_optimizer out, or use adam",
        )


def momenta_are_exchanged_once(config: Config) -> Iterator[ConfigIssue]:
    """1-bit Adam all-reduces fp32 momenta in place of gradients, which ZeRO reduces."""
    kind, stage = config.optimizer.optimizer_type, config.deepspeed.zero_stage
    if "compressed_comm" in OPTIMIZERS.entry(kind).traits and _zero_was_requested(config):
        yield ConfigIssue(
            f"{kind} exchanges momenta in place of gradients, and ZeRO stage {stage} sums gradients",
            key="optimizer",
            value=config.optimizer.optimizer,
            hint="use zero_optimization: {stage: 0}, or adam",
        )


def flat_shards_need_full_precision(config: Config) -> Iterator[ConfigIssue]:
    """DeepSpeed keeps the fp32 copies of low-precision weights as flat shards."""
    kind, precision = config.optimizer.optimizer_type, config.precision.precision
    traits = OPTIMIZERS.entry(kind).traits
    if "zero1" in traits and precision == "bfloat16" and config.deepspeed.zero_stage == 1:
        return  # it has fp32 copies of its own
    if traits & {"full_tensors", "compressed_comm"} and precision != "fp32":
        yield ConfigIssue(
            f"{kind} works on full fp32 tensors, and DeepSpeed makes flat fp32 copies of {precision} weights",
            key="precision",
            value=precision,
            hint="use precision: fp32, or adam, lion or sgd",
        )


def full_tensors_need_no_expert_parallel(config: Config) -> Iterator[ConfigIssue]:
    """Expert-parallel ranks each hold a shard of the expert stack, and reduce its gradients in their own group."""
    kind, size = config.optimizer.optimizer_type, config.moe.moe_expert_parallel_size
    entry = OPTIMIZERS.entry(kind)
    if not entry.traits & {"full_tensors", "compressed_comm"} or config.moe.moe_num_experts <= 1 or size <= 1:
        return
    if "split_experts" not in entry.settings:
        yield ConfigIssue(
            f"{kind} works on full tensors and all data-parallel ranks, and experts are sharded over ranks",
            key="moe_expert_parallel_size",
            value=size,
            hint="use 1, or adam, lion or sgd",
        )
    elif not config.optimizer.params.get("split_experts"):
        yield ConfigIssue(
            f"{kind} takes the experts of a block for one matrix, and they are sharded over ranks",
            key="moe_expert_parallel_size",
            value=size,
            hint="add split_experts: true to the optimizer's params, which orthogonalizes each expert apart; or use 1",
        )


def one_average_of_the_weights(config: Config) -> Iterator[ConfigIssue]:
    """A moving average has a decay between 0 and 1, one optimizer to follow, and its fp32 weights in memory."""
    decay, kind = config.optimizer.ema_decay, config.optimizer.optimizer_type
    if decay is None:
        return
    if not 0.0 < decay < 1.0:
        message, hint = "the decay is not between 0 and 1", "write a number such as 0.999"
    elif kind == "schedulefree":
        message, hint = f"{kind} averages the weights itself", "leave ema_decay out, or use adam"
    elif offloads(config, "nvme"):
        message, hint = "the fp32 weights are on a disk, and their average is in memory", "offload to the cpu"
    else:
        return
    yield ConfigIssue(message, key="ema_decay", value=decay, hint=hint)


def iterates_are_averaged_in_memory(config: Config) -> Iterator[ConfigIssue]:
    """An evaluation of a schedule-free optimizer exchanges the weights for their average."""
    if config.optimizer.optimizer_type == "schedulefree" and offloads(config, "nvme"):
        yield ConfigIssue(
            "schedulefree exchanges the weights for their average at evaluations, and they are on a disk",
            key="zero_optimization",
            value=config.deepspeed.zero_optimization,
            hint="offload to the cpu, or use adam",
        )


def host_memory_holds_parameters(config: Config) -> Iterator[ConfigIssue]:
    """A CPU optimizer needs parameters, or copies of them, in the host's memory."""
    kind = config.optimizer.optimizer_type
    if "cpu_offload" not in OPTIMIZERS.entry(kind).traits or config.launch.distributed_backend != "nccl":
        return
    if not offloads(config):
        yield ConfigIssue(
            f"{kind} updates in the host's memory, and the parameters are on the GPU",
            key="optimizer",
            value=config.optimizer.optimizer,
            hint="add offload_optimizer: {device: cpu} to zero_optimization, or use adam",
        )


def offloads(config: Config, device: str = "cpu") -> bool:
    """Returns whether ZeRO has the optimizer's parameters on a device, such as the host's memory."""
    offload = (config.deepspeed.zero_optimization or {}).get("offload_optimizer") or {}
    return bool(offload.get("device") == device)


def eight_bits_are_built(config: Config) -> Iterator[ConfigIssue]:
    """Bitsandbytes has 8-bit forms of some optimizers only."""
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


def apex_has_what_is_asked(config: Config) -> Iterator[ConfigIssue]:
    """Apex's Adam has neither the largest second moments nor 8-bit state, and runs on GPUs only."""
    section = config.optimizer
    if not config.kernels.use_apex_adam or OPTIMIZERS.entry(section.optimizer_type).kernel != FUSED_ADAM:
        return
    lacking = {
        "amsgrad": section.params.get("amsgrad"),
        "8-bit state": section.use_bnb_optimizer,
        "kernel for the host's memory, which offload_optimizer uses": offloads(config),
    }
    for name, is_asked in lacking.items():
        if is_asked:
            hint = "leave one of the two out; without use_apex_adam torch's fused Adam serves"
            yield ConfigIssue(f"Apex's Adam has no {name}", key="use_apex_adam", value=True, hint=hint)


def nesterov_needs_momentum(config: Config) -> Iterator[ConfigIssue]:
    """Nesterov momentum needs a momentum."""
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


def options_of_muon_go_together(config: Config) -> Iterator[ConfigIssue]:
    """Some options of muon are about others."""
    params, value = config.optimizer.params, config.optimizer.optimizer
    if "normuon" not in OPTIMIZERS.entry(config.optimizer.optimizer_type).settings:
        return
    for name, needed in (("split_heads", "split_qkv"), ("normuon_beta2", "normuon")):
        if params.get(name) and not params.get(needed):
            what, hint = f"{name} has an effect with {needed} only", f"add {needed}: true, or leave {name} out"
            yield ConfigIssue(what, key="optimizer", value=value, hint=hint)
    yield from _qk_clip_scales_logits(config)
    if params.get("normuon") and params.get("adjust_lr_fn") == "original":
        yield ConfigIssue(
            "normuon scales every step to that of AdamW, whatever adjust_lr_fn says",
            key="optimizer",
            value=value,
            hint="leave adjust_lr_fn out, and choose a learning rate of AdamW",
        )


def _qk_clip_scales_logits(config: Config) -> Iterator[ConfigIssue]:
    """Logits shrink as much as the weights of queries and keys, which are all that they are made of."""
    params, model = config.optimizer.params, config.model
    threshold = params.get("qk_clip_threshold")
    if threshold is None:
        return
    if isinstance(threshold, (int, float)) and threshold <= 0:
        what = f"qk_clip_threshold = {threshold} is not above 0"
        yield ConfigIssue(what, key="optimizer", value=config.optimizer.optimizer, hint="write 100, as in the paper")
    reasons = {
        "use_qk_layernorm": (model.use_qk_layernorm, "norms of queries and keys undo what qk_clip_threshold scales"),
        "use_bias_in_attn_linear": (model.use_bias_in_attn_linear, "qk_clip_threshold scales weights, and no biases"),
        "add_qkv_bias": (model.add_qkv_bias, "qk_clip_threshold scales weights, and no biases"),
        "lora": (model.lora, "qk_clip_threshold scales trained weights, and these are frozen"),
        "context_parallel_size": (
            config.parallelism.context_parallel_size > 1,
            "qk_clip_threshold needs all keys of a sequence on one rank",
        ),
    }
    for key, (applies, what) in reasons.items():
        if applies:
            value = config.flat()[key]
            yield ConfigIssue(what, key=key, value=value, hint="change it, or leave qk_clip_threshold out")
