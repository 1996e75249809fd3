"""The plan of a run: parallel layout, batch equation, parameters, FLOPs and memory per rank, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.block_sparsity import visible_share
from megatron.config import Config, Resolution
from megatron.config.derived.attention import layer_classes
from megatron.config.derived.pipe_layout import pipe_layout
from megatron.config.derived.retrieval import sequences_of_sample
from megatron.config.derived.zero import REDUCTION_BUCKET
from megatron.param_table import ModelDims, TensorShape, trainable_tensors
from megatron.pipe_schedule.timing import in_flight
from megatron.plan.activation_layout import ActivationLayout
from megatron.plan.advice import advice
from megatron.plan.encoder_decoder import two_stack_activations, two_stack_flops
from megatron.plan.estimates import PlanFigures
from megatron.plan.flops import flops_per_iteration
from megatron.plan.kernel_choices import device_of, kernel_figures, kinds_with_scores
from megatron.plan.memory import Memory, StateLayout, state_memory
from megatron.plan.parameter_counts import (
    frozen_bytes,
    frozen_tensors,
    model_tensors,
    on_rank,
    split_experts,
    total,
    unsupported_reason,
)
from megatron.plan.retro import retro_activations, retro_flops
from megatron.plan.schedule import schedule_figures
from megatron.plan.stage_activations import stage_activations
from megatron.plan.stages import stage_bounds
from megatron.plan.text_report import plan_text
from megatron.plan.vocabulary import find_vocabulary
from megatron.registry import ACTIVATIONS, EIGHT_BIT, OPTIMIZERS, VANILLA

WIDTHS = {"fp32": 4, "bfloat16": 2, "fp16": 2, "bf16": 2}


class RunPlan(PlanFigures):
    """The figures, with their output as text and as JSON."""

    def json(self) -> dict[str, Any]:
        """Returns the `plan` object of `--dry-run --json`."""
        axes, training = self.config.parallelism, self.config.training
        figures: dict[str, Any] = {
            "world_size": axes.world_size,
            "pipe_parallel_size": axes.pipe_parallel_size,
            "model_parallel_size": axes.model_parallel_size,
            "data_parallel_size": axes.data_parallel_size,
            "train_batch_size": training.train_batch_size,
            "train_micro_batch_size_per_gpu": training.train_micro_batch_size_per_gpu,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
            "parameters": self.parameters,
            **({} if self.trainable is None else {"trainable_parameters": self.trainable}),
            "flops_per_iteration": self.flops_per_iteration,
            "memory_per_rank_bytes": self.memory.json() if self.memory else None,
            "kernels": kernel_figures(self.config, device_of(self.config)),
        }
        schedule = schedule_figures(self.config)
        if schedule is not None:
            figures["pipe_schedule"] = schedule
        if self.unknown:
            figures["unknown"] = self.unknown
        if self.budget is not None:
            figures["memory_available_bytes"] = self.budget
            figures["advice"] = list(self.advice)
        return figures

    def text(self) -> str:
        """Formats the plan as text."""
        return plan_text(self)


def make_plan(resolution: Resolution) -> RunPlan:
    """Computes the plan of a resolved configuration."""
    config = resolution.config
    vocabulary = find_vocabulary(config.tokenizer, config.parallelism.model_parallel_size)
    unknown = unsupported_reason(config) or (None if vocabulary.padded else vocabulary.source)
    gpu_memory = config.launch.gpu_memory
    budget = None if gpu_memory is None else int(gpu_memory * 2**30)
    warned, unbuilt = tuple(resolution.warnings), tuple(resolution.not_supported_yet)
    if unknown or vocabulary.padded is None:
        return RunPlan(
            config, vocabulary.source, unknown=unknown, budget=budget, warnings=warned, not_supported_yet=unbuilt
        )
    padded = vocabulary.padded
    table = model_tensors(config, padded)
    dims = ModelDims.of(config.model, config.moe, config.mixers)
    training, model = config.training, config.model
    assert training.train_batch_size
    assert model.seq_length
    flops = model_flops(config, table, seq_length=model.seq_length, train_batch_size=training.train_batch_size)
    bounds = bounds_of(config, table)
    memory = memory_of(config, table, padded, bounds)
    suggestions: list[str] = []
    if budget is not None and memory.total > budget:
        suggestions = advice(config, lambda changed: memory_of(changed, table, padded, bounds), budget)
    return RunPlan(
        config,
        f"{padded:,} rows from {vocabulary.source}",
        parameters=total(table),
        trainable=total(trainable_tensors(table)) if dims.frozen else None,
        flops_per_iteration=flops,
        memory=memory,
        budget=budget,
        advice=tuple(suggestions),
        stages=tuple(bounds),
        warnings=warned,
        not_supported_yet=unbuilt,
    )


def bounds_of(config: Config, table: list[TensorShape]) -> list[int]:
    """Returns the first layer of each pipeline stage, and the number of layers."""
    assert config.model.num_layers
    kinds = tuple(map(str, config.model.attention_config or ()))
    classes = layer_classes(config.model.num_layers, kinds)
    counts = [0] * len(classes)
    for tensor in table:
        if tensor.layer < len(counts):  # modules that predict further tokens go with the output layer
            counts[tensor.layer] += tensor.count
    return stage_bounds(config.parallelism.pipe_partition_method, classes, counts, pipe_layout(config).stages)


def _blocks(dims: ModelDims, first: int, end: int) -> list[int]:
    """Returns the blocks of a stage of layers first .. end - 1; modules that predict further tokens have one each."""
    blocks = list(range(max(first, 2) - 2, min(end - 2, dims.num_layers)))
    return blocks + ([dims.num_layers - 1] * dims.mtp_layers if end > dims.num_layers + 4 else [])


def memory_of(config: Config, table: list[TensorShape], padded_vocab_size: int, bounds: list[int]) -> Memory:
    """Returns the memory of the rank that needs most.

    Args:
        config: the configuration.
        table: every tensor of the model.
        padded_vocab_size: [tokens].
        bounds: first layers of the pipeline stages, and the number of layers.
    """
    axes, training, model = config.parallelism, config.training, config.model
    assert model.num_layers
    dims = ModelDims.of(model, config.moe, config.mixers)
    layout = pipe_layout(config)
    of_two_stacks: dict[str, Any] = {}
    has_logits = not (dims.classes or dims.towers)
    if dims.encoder_layers:
        of_two_stacks = {"of_block": two_stack_activations(config), "head_length": model.decoder_seq_length}
    elif dims.retro is not None:
        of_two_stacks = {"of_block": retro_activations}
    stored, activations = state_layout(config), activation_layout(config)
    candidates = []
    (shared, experts), trainable = split_experts(table), split_experts(trainable_tensors(table))
    copied = layout.rank_of(layout.stages - 1) != 0  # a tied output layer has a copy of the embedding
    held = zip(
        on_rank(shared, bounds, axes.model_parallel_size, tied=(dims.tied or dims.mtp_layers > 0) and copied),
        on_rank(experts, bounds, axes.model_parallel_size, tied=False),
        on_rank(
            trainable[0],
            bounds,
            axes.model_parallel_size,
            tied=dims.tied and dims.trains_embedding and copied,
        ),
        on_rank(trainable[1], bounds, axes.model_parallel_size, tied=False),
        strict=True,
    )
    of_stages = list(held)
    in_few_bits = [
        on_rank(part, bounds, axes.model_parallel_size, tied=False)
        for part in split_experts(frozen_tensors(dims, table))
    ]
    for rank, flying in enumerate(in_flight(layout, training.gradient_accumulation_steps or 1)):
        stages = layout.stages_of(rank)
        counts = [sum(of_stages[stage][kind] for stage in stages) for kind in range(4)]
        held_by = [
            stage_activations(
                dims,
                activations,
                blocks=_blocks(dims, bounds[stage], bounds[stage + 1]),
                under_way=flying[stage],
                padded_vocab_size=padded_vocab_size if stage == layout.stages - 1 and has_logits else None,
                pipelined=layout.stages > 1,
                **of_two_stacks,
            )
            for stage in stages
            if flying[stage]
        ]
        saved = sum(under_way for under_way, _ in held_by) + max(more for _, more in held_by)
        changed = (counts[2], counts[3]) if dims.frozen else None
        few, of_experts = (sum(part[stage] for stage in stages) for part in in_few_bits)
        parameters, gradients, optimizer = state_memory(counts[0] - few, stored, counts[1] - of_experts, changed)
        few += of_experts // stored.expert_parallel_size
        candidates.append(Memory(parameters + frozen_bytes(dims, few), gradients, optimizer, saved))
    return max(candidates, key=lambda memory: memory.total)


def model_flops(config: Config, table: Sequence[TensorShape], *, seq_length: int, train_batch_size: int) -> int:
    """Returns the FLOPs of an iteration as the plan and every report of a run count them.

    Args:
        config: of the run.
        table: every tensor of the model.
        seq_length: of this iteration [tokens].
        train_batch_size: [samples].
    """
    dims = ModelDims.of(config.model, config.moe, config.mixers)
    model = config.model
    if dims.encoder_layers and model.encoder_seq_length and model.decoder_seq_length:
        lengths = model.encoder_seq_length, model.decoder_seq_length
        return two_stack_flops(dims, table, lengths=lengths, train_batch_size=train_batch_size)
    if dims.retro is not None:
        return retro_flops(dims, table, seq_length=seq_length, train_batch_size=train_batch_size)
    if dims.towers:  # each sequence is read by one of them
        table = [tensor for tensor in table if tensor.layer < dims.tower_layers]
    sizes = {"seq_length": seq_length, "train_batch_size": train_batch_size * sequences_of_sample(config)}
    predicted = config.data.mask_prob if dims.masked_head else 1.0
    shares = visible_shares(config, seq_length)
    return flops_per_iteration(dims, table, shares=shares, predicted=predicted, **sizes)


def visible_shares(config: Config, seq_length: int | None = None) -> tuple[float, ...]:
    """Returns the visible fraction of each block's attention. seq_length: [tokens], the model's unless given."""
    model = config.model
    length = seq_length or model.seq_length
    assert model.attention_config
    assert length
    blocks = [
        (str(kind), options.sliding_window_width)
        for kind, options in zip(model.attention_config, model.block_options, strict=True)
    ]
    shares = {
        (kind, window): visible_share(kind, model.sparsity_config, 0, window, length) for kind, window in set(blocks)
    }  # random blocks differ between transformer blocks, hardly in their number
    return tuple(shares[block] for block in blocks)


def state_layout(config: Config) -> StateLayout:
    """Returns the settings of parameters, gradients and optimizer, with DeepSpeed's defaults."""
    zero = config.deepspeed.zero_optimization or {}
    stage = zero.get("stage", 0)
    width = WIDTHS[config.precision.precision or "fp32"]
    summed = (config.precision.data_types or {}).get("grad_accum_dtype") or config.precision.precision
    buffers = 2 if zero.get("overlap_comm") and stage != 3 else 1
    family = EIGHT_BIT if config.optimizer.use_bnb_optimizer else OPTIMIZERS
    gathered = [zero.get(f"stage3_max_{name}", 1_000_000_000) for name in ("live_parameters", "reuse_distance")]
    return StateLayout(
        width,
        stage if isinstance(stage, int) else 0,  # the autotuner may still choose
        config.parallelism.data_parallel_size,
        config.deepspeed.zero_reduce_bucket_size or REDUCTION_BUCKET,
        buffers=buffers if zero.get("contiguous_gradients", True) else 0,
        summed=WIDTHS.get(str(summed), width),
        expert_parallel_size=config.moe.moe_expert_parallel_size,
        gathered=int(max(size for size in gathered if isinstance(size, (int, float)))),
        state_per_param=family.entry(config.optimizer.optimizer_type).state_per_param
        + (config.optimizer.ema_decay is not None),
        secondary=int(zero.get("zero_hpz_partition_size") or 0),
    )


def activation_layout(config: Config) -> ActivationLayout:
    """Returns the settings of activations."""
    axes, model, recompute = config.parallelism, config.model, config.recompute
    assert model.seq_length
    assert config.training.train_micro_batch_size_per_gpu
    selective = recompute.recompute_granularity == "selective"
    recompute_blocks = (recompute.checkpoint_activations or recompute.recompute_granularity == "full") and not selective
    device = device_of(config)
    on_cpu = device == "cpu"
    partitioned = recompute.partition_activations and not axes.sequence_parallel  # which cuts what is kept already
    saved_fraction = 1 / axes.model_parallel_size if partitioned else 1.0
    return ActivationLayout(
        seq_length=model.seq_length,
        micro_batch=config.training.train_micro_batch_size_per_gpu * sequences_of_sample(config),
        model_parallel_size=axes.model_parallel_size,
        width=WIDTHS[config.precision.precision or "fp32"],
        recompute=recompute.checkpoint_num_layers if recompute_blocks else 0,
        hidden_dropout=model.hidden_dropout > 0,
        attention_dropout=model.attention_dropout > 0,
        cpu=on_cpu,
        first_only=recompute_blocks and recompute.recompute_method == "block",
        selective=selective,
        saved_fraction=0.0 if recompute.checkpoint_in_cpu and not on_cpu else saved_fraction,
        context_parallel_size=axes.context_parallel_size,
        ring_size=axes.ring_size(model.num_kv_heads or 1),
        sequence_parallel=axes.sequence_parallel,
        shares=visible_shares(config),
        fused_scan=not on_cpu
        and axes.context_parallel_size == 1
        and (config.kernels.mamba_selective_scan_fusion or config.kernels.mamba_inner_func_fusion),
        loss_in_blocks=config.kernels.fused_linear_cross_entropy,
        bounded_scores=model.attn_logit_softcapping is not None
        and (model.softmax_type != VANILLA or (on_cpu and model.attention_dropout > 0)),
        bounded_logits=model.final_logit_softcapping is not None,
        sinks=model.softmax_type != VANILLA,
        bounded_gates=ACTIVATIONS.entry(model.activation).gated
        and (model.activation_func_clamp_value is not None or model.glu_linear_offset != 0.0),
        kinds_with_scores=kinds_with_scores(config, device),
    )
