"""Formats the plan as text."""

from __future__ import annotations

from collections import Counter

from megatron.adapter_config import low_rank, soft_prompt
from megatron.config import Config
from megatron.config.derived.retrieval import sequences_of_sample
from megatron.param_table import ModelDims, base_widths
from megatron.plan.advice import gib
from megatron.plan.estimates import PlanFigures
from megatron.plan.kernel_choices import device_of, kernel_lines
from megatron.plan.schedule import schedule_lines
from megatron.registry import ATTENTION_ALONE, BIDIRECTIONAL, MLP_ALONE, RETRIEVAL_HEAD, WITHOUT_ATTENTION

WIDTH = 12


def plan_text(plan: PlanFigures) -> str:
    """Formats model, layout, batch, FLOPs and memory, then warnings and unsupported values."""
    lines = ["RunPlan", *_model(plan), *_world(plan.config), *_batch(plan.config), *_schedule(plan.config)]
    lines += [*_work(plan), *_memory(plan)]
    lines += _kernels(plan.config)
    lines += _listed("Warnings", plan.warnings)
    lines += _listed("Not built yet, so launching this would be refused", plan.not_supported_yet)
    return "\n".join(lines) + "\n"


def _kernels(config: Config) -> list[str]:
    """Formats the table of kernels."""
    first, *others = kernel_lines(config, device_of(config))
    return [_line("kernels", first), *(_line("", line) for line in others)]


def _schedule(config: Config) -> list[str]:
    """Formats the pipeline schedule."""
    return [_line("" if number else "schedule", line) for number, line in enumerate(schedule_lines(config))]


def _line(name: str, text: str) -> str:
    return f"  {name:<{WIDTH}} {text}"


def _model(plan: PlanFigures) -> list[str]:
    model = plan.config.model
    kinds = sorted({str(kind) for kind in model.attention_config or ()})
    heads = f"{model.num_attention_heads} heads"
    if model.num_kv_heads != model.num_attention_heads:
        heads += f" over {model.num_kv_heads} key heads"
    blocks = f"{model.num_layers} blocks"
    if model.encoder_num_layers is not None:
        blocks = f"{model.encoder_num_layers} encoder and {model.decoder_num_layers} decoder blocks"
    if model.lm_head == RETRIEVAL_HEAD and not model.retrieval_shared_encoder:
        blocks = f"2 encoders of {blocks}"
    shape = f"{blocks} x {model.hidden_size}"
    direction = " bidirectional" if model.attention_mask == BIDIRECTIONAL else ""
    attention = f"{direction} attention" if set(kinds) - WITHOUT_ATTENTION else ""
    if attention:
        shape += f", {heads} x {model.kv_channels}, MLP {model.mlp_width}"
    shape += _experts(plan.config)
    norms = model.norm if model.norm_placement == "pre" else f"{model.norm} ({model.norm_placement})"
    mixing = _blocks_apart(plan.config) or f"{'/'.join(kinds)}{attention}"
    parts = f"{norms}, {model.activation}, {model.pos_emb} positions, {mixing}{_mamba2(plan.config)}"
    types = Counter(map(str, model.layer_types or ()))
    parts += f" ({', '.join(f'{count} {name}' for name, count in types.items())})" if types else ""
    count = f"{plan.parameters:,} ({short(plan.parameters)})" if plan.parameters else f"unknown: {plan.unknown}"
    lines = [_line("model", shape), _line("", parts), *_base(plan.config)]
    return [*lines, _line("vocabulary", plan.vocabulary), _line("parameters", count), *_trained(plan)]


def _blocks_apart(config: Config) -> str:
    """Formats how many blocks there are of each kind where some have one sublayer."""
    counts = Counter(map(str, config.model.attention_config or ()))
    if not {ATTENTION_ALONE, MLP_ALONE} & counts.keys():
        return ""
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) + " blocks"


def _mamba2(config: Config) -> str:
    """Formats the sizes of mamba2 blocks."""
    if "mamba2" not in map(str, config.model.attention_config or ()):
        return ""
    sizes = ModelDims.of(config.model, config.moe, config.mixers).mixers.mamba2
    return f", mamba2 {sizes.heads} heads x {sizes.head}, state {sizes.state}, {sizes.groups} groups"


def _base(config: Config) -> list[str]:
    """Formats the base model of muP."""
    base = base_widths(config.mup) if config.mup.mup_base_widths else None
    if base is None or config.model.hidden_size is None:
        return []
    ratio = config.model.hidden_size / base.hidden_size
    return [_line("muP", f"{ratio:g} x as wide as the base of {base.hidden_size} in {config.mup.base_shapes_file}")]


def _trained(plan: PlanFigures) -> list[str]:
    """Formats the trainable parameters of a frozen model."""
    model = plan.config.model
    updates, prompt = low_rank(model.lora), soft_prompt(model.soft_prompt_tuning)
    if updates is not None:
        text = f"updates of rank {updates.rank} to {', '.join(updates.targets)}, scale {updates.scale:g}"
        text += ", and the norms of their rows" if updates.magnitudes else ""
        text += "".join(f", and the {name}" for name in updates.modules_to_save)
    elif prompt is not None:
        text = f"a prompt of {prompt.num_tokens} vectors, which leaves {model.text_length} tokens to a text"
    else:
        return []
    if plan.trainable is not None and plan.parameters:
        text = f"{plan.trainable:,} of them ({plan.trainable / plan.parameters:.2%}): {text}"
    return [_line("trained", text)]


def _experts(config: Config) -> str:
    moe = config.moe
    if moe.moe_num_experts == 1:
        return ""
    dims = ModelDims.of(config.model, moe, config.mixers)
    count = sum(dims.has_experts(block) for block in range(dims.num_layers))
    location = "" if count == dims.num_layers else f" in {count} of {dims.num_layers} blocks"
    width = f" of {moe.moe_ffn_hidden_size}" if moe.moe_ffn_hidden_size else ""
    shared = moe.moe_shared_expert_intermediate_size
    return f" x {moe.moe_num_experts} experts{width}{location}, {moe.moe_top_k} a token" + (
        f", shared {shared}" if shared else ""
    )


def _world(config: Config) -> list[str]:
    axes = config.parallelism
    stages = "no pipeline" if axes.pipe_parallel_size == 0 else f"pipeline {axes.pipe_parallel_size}"
    text = f"{axes.world_size} ranks = {stages} x data {axes.data_parallel_size} x tensor {axes.model_parallel_size}"
    if axes.context_parallel_size > 1:
        text += f" x context {axes.context_parallel_size} ({axes.context_parallel_method})"
    if config.moe.moe_expert_parallel_size > 1:
        text += f", experts over {config.moe.moe_expert_parallel_size}"
    fp8 = config.precision.fp8
    numbers = f"{config.precision.precision}" + (f", products in FP8 ({fp8['recipe']})" if fp8 else "")
    return [_line("world", f"{text}, ZeRO {config.deepspeed.zero_stage}, {numbers}")]


def _batch(config: Config) -> list[str]:
    training, axes, model = config.training, config.parallelism, config.model
    assert training.train_batch_size
    assert model.seq_length
    text = (
        f"{training.train_batch_size} samples = micro batch {training.train_micro_batch_size_per_gpu} "
        f"x accumulation {training.gradient_accumulation_steps} x data {axes.data_parallel_size}"
    )
    tokens = training.train_batch_size * model.seq_length * sequences_of_sample(config)
    parts = model.encoder_seq_length, model.decoder_seq_length
    length = f"{model.seq_length}" if None in parts else f"{parts[0]} + {parts[1]}"
    lines = [_line("batch", text), _line("", f"{tokens:,} tokens a step at sequence length {length}")]
    if training.train_iters is not None:
        lines.append(_line("length", f"{training.train_iters:,} steps, {short(tokens * training.train_iters)} tokens"))
    lr = config.optimizer.lr
    if lr is not None:
        schedule = config.schedule
        horizon = f" over {schedule.lr_decay_iters:,} steps" if schedule.lr_decay_iters else ""
        text = f"{config.optimizer.optimizer_type}, {lr:g} {schedule.lr_decay_style} to {schedule.min_lr:g}{horizon}"
        horizon_length = schedule.lr_decay_iters or schedule.lr_decay_samples
        counted = "steps" if schedule.lr_decay_iters else "samples"
        rise = (
            f"{schedule.warmup_length(horizon_length):,} {counted} of warmup"
            if horizon_length
            else f"warmup {schedule.warmup:g} of it"
        )
        lines.append(_line("optimizer", f"{text}, {rise}"))
    return lines


def _work(plan: PlanFigures) -> list[str]:
    if plan.flops_per_iteration is None:
        return []
    text = f"{plan.flops_per_iteration:.3g} FLOP an iteration, forward and backward, without recomputation"
    return [_line("work", text)]


def _memory(plan: PlanFigures) -> list[str]:
    memory = plan.memory
    if memory is None:
        return []
    parts = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
    }
    text = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
    lines = [_line("memory", f"{gib(memory.total)} on the fullest rank"), _line("", text)]
    if plan.budget is None:
        return lines
    if memory.total <= plan.budget:
        return [*lines, _line("", f"fits the {gib(plan.budget)} of gpu_memory")]
    lines.append(_line("", f"exceeds the {gib(plan.budget)} of gpu_memory; what would lower it:"))
    return lines + [_line("", f"- {one}") for one in plan.advice]


def _listed(title: str, items: tuple[str, ...]) -> list[str]:
    return [f"{title} ({len(items)})", *(f"  - {item}" for item in items)] if items else []


def short(count: float) -> str:
    """Formats a large number in three digits: 410M, 20.6B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
