"""Builds engines from the configuration: layers, model, stored weights, optimizer, DeepSpeed.

Only this file calls deepspeed.initialize and knows whether the model is a pipeline.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron.adapter_config import prompt_length
from megatron.checkpoint.load.loader import Checkpoint, find_checkpoint, read_weights, validate
from megatron.config import Config
from megatron.config.deepspeed_config import deepspeed_config
from megatron.config.derived.pipe_layout import pipe_layout
from megatron.config.validation.unknown_values import require
from megatron.distributed.init import init_distributed
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import device
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.engine.base import BaseEngine
from megatron.engine.bf16_step import replace_step
from megatron.engine.compile import compile_blocks
from megatron.engine.deepspeed_engine import PlainEngine, keyed_parameters
from megatron.engine.deepspeed_setup import (
    cap_reduce_bucket,
    create_secondary_groups,
    disable_grad_allreduce,
    mark_gathered_blocks,
    silence_deepspeed,
    skip_lone_allreduce,
)
from megatron.engine.drafter import Drafter
from megatron.engine.expert_bias import correction_biases
from megatron.engine.expert_gather import local_experts
from megatron.engine.fp8 import use_fp8
from megatron.engine.freeze import allow_empty_grad_norm, freeze, optimizer_parameters, start_magnitudes, start_prompt
from megatron.engine.frozen_base import freeze_base, frozen_format
from megatron.engine.inference_engine import InferenceEngine, build_stage, hold_magnitudes, pack
from megatron.engine.loss_setup import further_losses, loss_function, loss_parts, router_losses
from megatron.engine.muon_step import MuonStep
from megatron.engine.outlier_steps import outlier_steps
from megatron.engine.pipeline_engine import PipelinedEngine
from megatron.engine.recompute import full_recompute, selective_recompute
from megatron.engine.transformer_engine import use_transformer_engine
from megatron.engine.weight_average import weight_average
from megatron.errors import ConfigError
from megatron.kernels.dispatch import facts_of, load_optimizer_kernel
from megatron.kernels.weight_gradients import WeightGradients
from megatron.model.chunked_model import ChunkedModel
from megatron.model.kv_cache import KVCache, cache_dtype
from megatron.model.layers import LayerSpec, build_layer_specs
from megatron.model.loss_parts import LossParts
from megatron.model.model_spec import ModelSpec
from megatron.model.moe.losses import RouterLossTracker
from megatron.model.multi_token import FurtherLosses
from megatron.model.pipeline_model import PipelinedModel
from megatron.model.recompute import Recompute
from megatron.model.retrieval_model import RetrievalModel
from megatron.model.retro_model import RetroModel
from megatron.model.sequential_model import SequentialModel
from megatron.model.value_residual import CarryShape
from megatron.objectives.classification import ClassScores
from megatron.optim.builder_args import OptimizerArgs
from megatron.optim.grad_clip import GradientClipper, StepValues
from megatron.optim.master_muon import MasterMuon
from megatron.optim.onebit import OnebitAdam
from megatron.optim.param_groups import balance_group_count, parameter_groups
from megatron.param_table import PROMPT, ModelDims, TensorShape, learning_rates, recurrent_state_shapes, tensors
from megatron.pipe_schedule.layout import SPLIT
from megatron.registry import BIDIRECTIONAL, EIGHT_BIT, MASKED_HEAD, OPTIMIZERS, WITHOUT_ATTENTION
from megatron.tokenizer_info import TokenizerInfo

DTYPES = {"fp32": torch.float32, "bfloat16": torch.bfloat16, "fp16": torch.float16}


def init_topology(config: Config) -> Topology:
    """Initializes the process groups of the configured layout, and seeds the generators."""
    axes = config.parallelism
    return init_distributed(
        pipe_parallel_size=axes.pipe_parallel_size,
        model_parallel_size=axes.model_parallel_size,
        seed=config.training.seed,
        context_parallel_size=axes.context_parallel_size,
        ulysses_size=axes.ulysses_size(require(config.model.num_kv_heads)),
        zigzag=not config.model.in_order,
        key_head_size=-(-axes.model_parallel_size // require(config.model.num_kv_heads)),
        expert_parallel_size=config.moe.moe_expert_parallel_size,
        sequence_parallel=axes.sequence_parallel,
        fp32_allreduce=config.precision.fp32_allreduce,
        backend=config.launch.distributed_backend,
        timeout_seconds=config.launch.collective_timeout,
        deterministic=config.training.deterministic,
    )


def build_training_engine(
    config: Config,
    topology: Topology,
    *,
    padded_vocab_size: int,
    vocab_size: int | None = None,
    checkpoint: Checkpoint | None = None,
    prompt_tokens: Sequence[int] = (),
    scores: ClassScores | None = None,
) -> BaseEngine:
    """Builds an engine with initial weights of the seed, or those of a checkpoint (its optimizer is restored later).

    Args:
        config: full configuration.
        topology: layout of the ranks.
        padded_vocab_size: rows of the embedding [tokens].
        vocab_size: rows that are tokens; all unless set.
        checkpoint: checkpoint to load weights from.
        prompt_tokens: tokens whose vectors initialize a soft prompt that is not in the checkpoint.
        scores: receives the logits or embeddings of evaluations.
    """
    silence_deepspeed()
    store = frozen_format(config.model.lora)
    random = TensorParallelRNG(config.training.seed, topology.rank, device())
    losses, parts = router_losses(config.moe), loss_parts(config.model, config.retrieval)
    layout = pipe_layout(config)
    later = WeightGradients() if layout.schedule in SPLIT else None
    layer_specs = _layer_specs(config, topology, padded_vocab_size, random, vocab_size, losses, later, parts)
    recompute = full_recompute(config.recompute, topology, random, require(config.model.num_layers))
    loss = loss_function(config, topology, vocab_size, parts=parts, scores=scores)
    further = further_losses(config.model, parts)
    model: Module
    if config.parallelism.is_pipe_parallel:
        method = config.parallelism.pipe_partition_method
        build = PipelinedModel if layout.chunks == 1 else partial(ChunkedModel, layout=layout)
        model = build(layer_specs, topology, partition_method=method, loss=loss, recompute=recompute, further=further)
        parameters = model.keyed_parameters()
        layers = model.layer_range
    else:
        model = _plain_model(config, layer_specs, recompute, further).to(device())
        parameters = keyed_parameters(model)
        layers = range(len(layer_specs))
    use_transformer_engine(config.transformer_engine, model, topology, selective_recompute(config.recompute))
    use_fp8(config.precision.fp8, model, device())
    if config.kernels.compile:
        compile_blocks(model, _block_input_shape(config, topology))
    stored = {**parameters, **correction_biases(model)}
    loaded = load_weights(stored, checkpoint, topology) if checkpoint is not None else set()
    if prompt_tokens and f"0.{PROMPT}" not in loaded:
        start_prompt(parameters, prompt_tokens, topology.model)
    start_magnitudes(model, {id(parameters[key]) for key in loaded if key in parameters})
    stored_base = freeze_base(store, model, parameters)
    freeze(parameters, tensors(ModelDims.of(config.model, config.moe, config.mixers), padded_vocab_size))
    initialised, clipper = _initialize(config, topology, model, parameters)
    average = weight_average(initialised.optimizer, parameters, config.optimizer.ema_decay)
    shared: dict[str, Any] = {
        "deepspeed": initialised,
        "topology": topology,
        "parameters": parameters,
        "stored_base": stored_base,
        "make_cache": _cache_factory(config, topology, layers),
        "random": random,
        "clipper": clipper,
        "router_losses": losses,
        "loss_parts": parts,
        "prompt": prompt_length(config.model.soft_prompt_tuning),
        "average": average,
        "outliers": outlier_steps(config.training.skip_outlier_steps, config.training.outlier_window, device()),
    }
    if config.parallelism.is_pipe_parallel:
        shared["carry"] = _carry_shape(config, topology)
        shared["padded_vocab_size"] = padded_vocab_size
        shared["dtype"] = DTYPES[require(config.precision.precision)]
        if layout.chunks == 1:
            return PipelinedEngine(**shared)
        from megatron.engine.scheduled_engine import ScheduledEngine  # imports torch.compile, which takes a second

        return ScheduledEngine(**shared, layout=layout, weight_gradients=later)
    return PlainEngine(**shared, loss=loss)


def _plain_model(
    config: Config, layers: Sequence[LayerSpec], recompute: Recompute | None, further: FurtherLosses | None
) -> Module:
    """Builds the model as one module; recompute and further as for SequentialModel."""
    dims = ModelDims.of(config.model, config.moe, config.mixers)
    if dims.retro is not None:
        return RetroModel(layers, dims.retro, recompute)
    if towers := dims.towers:
        return RetrievalModel(layers, towers, require(config.training.train_micro_batch_size_per_gpu), recompute)
    return SequentialModel(layers, recompute, further)


def build_inference_engine(
    config: Config, topology: Topology, padded_vocab_size: int, tokenizer: TokenizerInfo | None = None
) -> InferenceEngine:
    """Builds the model of the checkpoint at `load`, without optimizer, on any layout.

    Raises ConfigError if `load` is not set or not found: a checkpoint is required for inference.

    Args:
        config: full configuration.
        topology: layout of the ranks.
        padded_vocab_size: rows of the embedding [tokens].
        tokenizer: tokenizer of the caller, which must be that of the model's training.
    """
    checkpoint = find_checkpoint(
        config,
        tensors(ModelDims.of(config.model, config.moe, config.mixers), padded_vocab_size),
        tokenizer=tokenizer,
        weights_only=True,
    )
    if checkpoint is None:
        raise ConfigError.of(
            "there is no checkpoint to run",
            key="load",
            value=config.checkpoint.load,
            hint="set load to a save folder",
        )
    stage = build_stage(_layer_specs(config, topology, padded_vocab_size), topology)
    load_weights({**stage.parameters, **stage.buffers}, checkpoint, topology)
    hold_magnitudes(stage)
    pack(stage)
    drafter, depths = None, config.model.mtp_num_layers or 0
    if depths:
        last = require(config.model.num_layers) + 1
        drafter = Drafter.of(stage.functions, depths, topology, _cache_factory(config, topology, [last]))
        stage = replace(stage, functions=stage.functions[:-depths])
    engine = InferenceEngine(
        stage,
        topology,
        _cache_factory(config, topology, stage.indices),
        carry=_carry_shape(config, topology),
        padded_vocab_size=padded_vocab_size,
        dtype=DTYPES[require(config.precision.precision)],
        prompt=prompt_length(config.model.soft_prompt_tuning),
        drafter=drafter,
    )
    validate(checkpoint, engine)
    return engine


@torch.no_grad()
def load_weights(parameters: Mapping[str, Tensor], checkpoint: Checkpoint, topology: Topology) -> set[str]:
    """Copies stored weights into parameters and stored buffers; returns their keys, without those that start anew."""
    table: dict[str, TensorShape] = {f"{shape.layer}.{shape.name}": shape for shape in checkpoint.table}
    stored = read_weights(checkpoint, topology, [table[key] for key in parameters])
    for key, value in stored.items():
        parameters[key].copy_(local_experts(parameters[key], value))
    return set(stored)


def _layer_specs(
    config: Config,
    topology: Topology,
    padded_vocab_size: int,
    random: TensorParallelRNG | None = None,
    vocab_size: int | None = None,
    losses: RouterLossTracker | None = None,
    later: WeightGradients | None = None,
    parts: LossParts | None = None,
) -> list[LayerSpec]:
    encodes = config.model.attention_mask == BIDIRECTIONAL
    return build_layer_specs(
        ModelSpec(
            config.model,
            config.initialization,
            config.kernels,
            padded_vocab_size=padded_vocab_size,
            vocab_size=vocab_size,
            topology=topology,
            seed=config.training.seed,
            dtype=DTYPES[require(config.precision.precision)],
            device=device(),
            random=random,
            recompute_attention=selective_recompute(config.recompute),
            reset_attention=config.data.reset_attention_mask or encodes,
            reset_positions=config.data.reset_position_ids
            or (encodes and config.data.pack_impl == "packed" and config.model.lm_head == MASKED_HEAD),
            moe=config.moe,
            mixers=config.mixers,
            mup=config.mup,
            router_losses=losses,
            loss_parts=parts,
            weight_gradients=later,
        )
    )


def _carry_shape(config: Config, topology: Topology) -> CarryShape:
    """Returns the shapes of what passes from layer to layer."""
    return CarryShape.of(ModelDims.of(config.model, config.moe, config.mixers), topology.model)


def _block_input_shape(config: Config, topology: Topology) -> tuple[int, int, int]:
    """Returns the shape of a block's input on this rank, [s, b, h], for a micro batch of one sample."""
    length = require(config.model.seq_length) // topology.context.size
    return (
        length // (topology.model.size if topology.model.sequence_parallel else 1),
        1,
        require(config.model.hidden_size),
    )


def _initialize(
    config: Config, topology: Topology, model: Module, parameters: Mapping[str, Parameter]
) -> tuple[Any, StepValues | None]:
    """Wraps the model and our optimizer in DeepSpeed; at ZeRO 0 the optimizer clips before it steps.

    Also returns what holds the values of a step on the device; None where DeepSpeed reads them on the host.
    """
    section = config.optimizer
    trained = optimizer_parameters(model, parameters.values())
    groups = parameter_groups(trained, section.weight_decay, _lr_scales(config, parameters))
    if config.deepspeed.zero_stage != 0:
        groups = balance_group_count(groups, topology.pipe, device())
    family = EIGHT_BIT if section.use_bnb_optimizer else OPTIMIZERS
    build = family.load(section.optimizer_type)
    kernel = load_optimizer_kernel(
        family.entry(section.optimizer_type).kernel,
        facts_of(device(), DTYPES[require(config.precision.precision)], config.kernels, config.model.activation),
        config.kernels,
    )
    flat = config.deepspeed.zero_stage != 0
    optimizer = build(groups, OptimizerArgs(require(section.lr), topology, section.params, flat, kernel))
    clipper = None
    if config.deepspeed.zero_stage == 0:
        clipper = GradientClipper(parameters.values(), topology, section.gradient_clipping)
        clipper.attach(optimizer)
    mark_gathered_blocks(model)
    create_secondary_groups(config.deepspeed.zero_optimization or {}, topology)
    with redirect_stdout(io.StringIO()):  # its optimizers print their memory while they are built
        initialised, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=cap_reduce_bucket(
                deepspeed_config(config), sum(one.numel() for one in trained if one.requires_grad)
            ),
            mpu=None if config.parallelism.is_pipe_parallel else topology,
            dist_init_required=False,
        )
    skip_lone_allreduce(initialised, topology)
    allow_empty_grad_norm(initialised.optimizer)
    if isinstance(optimizer, OnebitAdam):
        optimizer.on_freeze = partial(disable_grad_allreduce, initialised, clipper)
    scaler = getattr(initialised.optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # the training loop reports too many overflows
    if isinstance(optimizer, MasterMuon):
        initialised.optimizer.step = step = MuonStep(initialised.optimizer, topology)
        return initialised, step
    return initialised, clipper or replace_step(initialised.optimizer)


def _lr_scales(config: Config, parameters: Mapping[str, Parameter]) -> dict[Parameter, float]:
    """Returns the learning-rate multipliers of muP; {} without it."""
    entrywise = "entrywise" in OPTIMIZERS.entry(config.optimizer.optimizer_type).traits
    dims = ModelDims.of(config.model, config.moe, config.mixers)
    rates = learning_rates(config.mup, dims, entrywise=entrywise)
    return {parameter: rates[key] for key, parameter in parameters.items() if key in rates}


def _cache_factory(config: Config, topology: Topology, layers: Sequence[int]) -> Callable[[int, int], KVCache]:
    """Returns a function that creates caches for the blocks among the given layers (block i is layer i + 2)."""
    dims, size = ModelDims.of(config.model, config.moe, config.mixers), topology.model.size
    blocks = [layer - 2 for layer in layers if 2 <= layer < 2 + dims.num_layers]
    attending = [block for block in blocks if dims.kind(block) not in WITHOUT_ATTENTION]

    dtype = DTYPES[require(config.precision.precision)]

    def make(batch: int, max_length: int) -> KVCache:
        max_length += dims.prompt
        shapes = {
            block: recurrent_state_shapes(dims, block, model_size=size, max_length=max_length) for block in blocks
        }
        return KVCache(
            len(attending),
            batch,
            1 if dims.latent else max(1, dims.num_kv_heads // size),
            max_length,
            dims.latent.cached if dims.latent else dims.head_dim,
            dtype=dtype if dims.latent else cache_dtype(dtype, device(), dims.head_dim),
            device=device(),
            attending=attending,
            states={block: shape for block, shape in shapes.items() if shape},
            prompt=dims.prompt,
            latents=dims.latent is not None,
        )

    return make
