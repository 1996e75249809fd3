"""Builds the engine that a configuration asks for, in order: layer plan, model, stored weights, optimizer, DeepSpeed.

This is the only place that calls deepspeed.initialize and that knows whether the model is a pipeline.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor
from torch.nn import Module, Parameter

from megatron.adapter_config import prompt_length
from megatron.checkpoint.load.loader import Checkpoint, find_checkpoint, read_weights, validate
from megatron.checkpoint.load.vocabulary import vocabulary_rows
from megatron.config import Config
from megatron.config.deepspeed_config import deepspeed_config
from megatron.config.defaults.vocabulary import padded_vocab_size
from megatron.config.defaults.zero import REDUCTION_BUCKET
from megatron.config.schema.tokenizer import TokenizerSection
from megatron.config.validation.unknown_values import require
from megatron.distributed.init import init_distributed
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import device
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.engine.base import BaseEngine
from megatron.engine.compile import compile_blocks
from megatron.engine.deepspeed_engine import Loss, PlainEngine, keyed_parameters
from megatron.engine.expert_gather import own_experts
from megatron.engine.freeze import allow_empty_grad_norm, freeze, optimizer_parameters, start_prompt
from megatron.engine.inference_engine import InferenceEngine, build_stage, pack
from megatron.engine.pipeline_engine import PipelinedEngine
from megatron.engine.recompute import full_recompute, selective_recompute
from megatron.engine.transformer_engine import use_transformer_engine
from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.model.block import Block
from megatron.model.kv_cache import KVCache, cache_dtype
from megatron.model.layers import LayerSpec, build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.moe.losses import RouterLossTracker
from megatron.model.pipeline_model import PipelinedModel
from megatron.model.sequential_model import SequentialModel
from megatron.optim.builder_args import Request
from megatron.optim.grad_clip import GradientClipper
from megatron.optim.muon import finds_groups
from megatron.optim.onebit import OnebitAdam
from megatron.optim.param_groups import balance_group_count, parameter_groups
from megatron.param_table import PROMPT, ModelDims, TensorShape, learning_rates, remembered, tensors
from megatron.registry import EIGHT_BIT, OBJECTIVES, OPTIMIZERS
from megatron.tokenizer_info import TokenizerInfo
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.vocab_limit import BoundedTokenizer

_log = get_logger(__name__)

DTYPES = {"fp32": torch.float32, "bfloat16": torch.bfloat16, "fp16": torch.float16}


def init_topology(config: Config) -> Topology:
    """Joins the process group of the layout that the configuration asks for, and seeds the generators."""
    axes = config.parallelism
    return init_distributed(
        pipe_parallel_size=axes.pipe_parallel_size,
        model_parallel_size=axes.model_parallel_size,
        seed=config.training.seed,
        context_parallel_size=axes.context_parallel_size,
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
) -> BaseEngine:
    """The engine with the initial weights of the seed, or those of a checkpoint (its optimizer is restored later).

    prompt_tokens: whose vectors a learned prompt starts as, where it is not in the checkpoint.
    """
    _silence_deepspeed()
    random = TensorParallelRNG(config.training.seed, topology.rank, device())
    losses = _router_losses(config)
    plan = _layer_specs(config, topology, padded_vocab_size, random, vocab_size, losses)
    recompute = full_recompute(config.recompute, topology, random, require(config.model.num_layers))
    loss = _loss(config, topology, vocab_size)
    model: Module
    if config.parallelism.is_pipe_parallel:
        method = config.parallelism.pipe_partition_method
        model = PipelinedModel(plan, topology, partition_method=method, loss=loss, recompute=recompute)
        parameters = model.keyed_parameters()
        layers = model.layer_range
    else:
        model = SequentialModel(plan, recompute).to(device())
        parameters = keyed_parameters(model)
        layers = range(len(plan))
    use_transformer_engine(config.transformer_engine, model, topology, selective_recompute(config.recompute))
    if config.kernels.compile:
        compile_blocks(model, _shape_in_blocks(config, topology))
    filled = fill(parameters, checkpoint, topology) if checkpoint is not None else set()
    if prompt_tokens and f"0.{PROMPT}" not in filled:
        start_prompt(parameters, prompt_tokens, topology.model)
    freeze(parameters, tensors(ModelDims.of(config.model, config.moe, config.mixers), padded_vocab_size))
    initialised, clipper = _initialize(config, topology, model, parameters)
    shared: dict[str, Any] = {
        "deepspeed": initialised,
        "topology": topology,
        "parameters": parameters,
        "make_cache": _cache_maker(config, topology, layers),
        "random": random,
        "clipper": clipper,
        "router_losses": losses,
        "prompt": prompt_length(config.model.soft_prompt_tuning),
    }
    if config.parallelism.is_pipe_parallel:
        return PipelinedEngine(
            **shared,
            hidden_size=require(config.model.hidden_size),
            padded_vocab_size=padded_vocab_size,
            dtype=DTYPES[require(config.precision.precision)],
        )
    return PlainEngine(**shared, loss=loss)


def build_vocabulary(
    config: Config, topology: Topology, tokenizer: Tokenizer, *, may_grow: bool = False
) -> tuple[Tokenizer, int]:
    """The tokenizer, and the rows of the embedding: those of the checkpoint that `load` names, if there is one.

    may_grow: whether the tokenizer's tokens beyond those rows get new ones; otherwise texts with them are refused.
    """
    rows = padded_vocab_size(tokenizer.vocab_size, config.tokenizer.make_vocab_size_divisible_by, topology.model.size)
    tokens = tokenizer.vocab_size
    found = vocabulary_rows(config, rows, tokens=tokens, model_size=topology.model.size, may_grow=may_grow)
    _same_vocabulary(config.tokenizer, tokens, found.rows)
    return tokenizer if found.known == tokens else BoundedTokenizer(tokenizer, found.known), found.rows


def _same_vocabulary(section: TokenizerSection, tokens: int, rows: int) -> None:
    """Holds what the configuration says of the vocabulary against what it is. ConfigError for other rows than `rows`.

    tokens: of the tokenizer. rows: of the embedding [tokens].
    """
    if section.padded_vocab_size not in (None, rows):
        raise ConfigError.of(
            f"the embedding has {rows:,} rows, for the {tokens:,} tokens of the tokenizer",
            key="padded_vocab_size",
            value=section.padded_vocab_size,
            hint="leave it out: it follows from the tokenizer, make_vocab_size_divisible_by and model_parallel_size",
        )
    if section.vocab_size not in (None, tokens, rows):
        told = "vocab_size = %d: has no effect; the tokenizer has %d tokens"
        _log.warning(told, section.vocab_size, tokens)


def build_inference_engine(
    config: Config, topology: Topology, padded_vocab_size: int, tokenizer: TokenizerInfo | None = None
) -> InferenceEngine:
    """The model of the checkpoint that `load` names, without optimizer, on any layout.

    tokenizer: the reader's, which must be the one that the model was trained with. Raises ConfigError when `load` is
    not set or points nowhere: random weights have nothing to say.
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
    fill(stage.parameters, checkpoint, topology)
    pack(stage)
    engine = InferenceEngine(
        stage,
        topology,
        _cache_maker(config, topology, stage.indices),
        hidden_size=require(config.model.hidden_size),
        padded_vocab_size=padded_vocab_size,
        dtype=DTYPES[require(config.precision.precision)],
        prompt=prompt_length(config.model.soft_prompt_tuning),
    )
    validate(checkpoint, engine)
    return engine


@torch.no_grad()
def fill(parameters: Mapping[str, Parameter], checkpoint: Checkpoint, topology: Topology) -> set[str]:
    """Copies stored weights into parameters, by key; the keys. What the run starts anew is not among them."""
    table: dict[str, TensorShape] = {f"{shape.layer}.{shape.name}": shape for shape in checkpoint.table}
    stored = read_weights(checkpoint, topology, [table[key] for key in parameters])
    for key, value in stored.items():
        parameters[key].copy_(own_experts(parameters[key], value))
    return set(stored)


def _layer_specs(
    config: Config,
    topology: Topology,
    padded_vocab_size: int,
    random: TensorParallelRNG | None = None,
    vocab_size: int | None = None,
    losses: RouterLossTracker | None = None,
) -> list[LayerSpec]:
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
            reset_attention=config.data.reset_attention_mask,
            reset_positions=config.data.reset_position_ids,
            moe=config.moe,
            mixers=config.mixers,
            mup=config.mup,
            router_losses=losses,
        )
    )


def _shape_in_blocks(config: Config, topology: Topology) -> tuple[int, int, int]:
    """What the blocks of this rank compute on, [s, b, h]; one sample stands for all."""
    length = require(config.model.seq_length) // topology.context.size
    return (
        length // (topology.model.size if topology.model.sequence_parallel else 1),
        1,
        require(config.model.hidden_size),
    )


def _router_losses(config: Config) -> RouterLossTracker | None:
    """The losses of the routers; None where no block has experts."""
    moe = config.moe
    return RouterLossTracker(moe.moe_aux_loss_coeff, moe.moe_z_loss_coeff) if moe.moe_num_experts > 1 else None


def _loss(config: Config, topology: Topology, vocab_size: int | None) -> Loss:
    objective = OBJECTIVES.load(config.training.train_impl)()

    def loss(logits: Tensor, labels: Tensor, loss_mask: Tensor, tokens: Tensor) -> Tensor:
        value: Tensor = objective.loss(logits, labels, loss_mask, topology.model, tokens=tokens, vocabulary=vocab_size)
        return value

    return loss


def _initialize(
    config: Config, topology: Topology, model: Module, parameters: Mapping[str, Parameter]
) -> tuple[object, GradientClipper | None]:
    """DeepSpeed around the model and our optimizer; at ZeRO 0 the optimizer clips before it steps."""
    section = config.optimizer
    trained = optimizer_parameters(model, parameters.values())
    groups = parameter_groups(trained, section.weight_decay, _rates(config, parameters))
    if config.deepspeed.zero_stage != 0:
        groups = balance_group_count(groups, topology.pipe, device())
    family = EIGHT_BIT if section.use_bnb_optimizer else OPTIMIZERS
    build = family.load(section.optimizer_type)
    optimizer = build(
        groups, Request(require(section.lr), topology, section.params, pieces=config.deepspeed.zero_stage != 0)
    )
    clipper = None
    if config.deepspeed.zero_stage == 0:
        clipper = GradientClipper(parameters.values(), topology, section.gradient_clipping)
        clipper.attach(optimizer)
    _gather_blocks_whole(model)
    with redirect_stdout(io.StringIO()):  # its optimizers print their memory at every stage of their making
        initialised, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=_fitted(deepspeed_config(config), sum(one.numel() for one in trained if one.requires_grad)),
            mpu=None if config.parallelism.is_pipe_parallel or finds_groups(optimizer) else topology,
            dist_init_required=False,
        )
    allow_empty_grad_norm(initialised.optimizer)
    if isinstance(optimizer, OnebitAdam):
        optimizer.on_freeze = partial(_disable_grad_allreduce, initialised, clipper)
    scaler = getattr(initialised.optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # the training loop says when there were too many overflows
    return initialised, clipper


def _fitted(settings: dict[str, Any], elements: int) -> dict[str, Any]:
    """The same for DeepSpeed, with a reduction bucket that all gradients of this rank fill; it makes one outright."""
    zero = settings["zero_optimization"]
    if zero["stage"] == 0:
        return settings
    asked = zero.get("reduce_bucket_size", REDUCTION_BUCKET)
    return {**settings, "zero_optimization": {**zero, "reduce_bucket_size": min(int(asked), elements)}}


def _rates(config: Config, parameters: Mapping[str, Parameter]) -> dict[Parameter, float]:
    """Factors of the learning rate under muP; {} without it."""
    entrywise = "entrywise" in OPTIMIZERS.entry(config.optimizer.optimizer_type).traits
    dims = ModelDims.of(config.model, config.moe, config.mixers)
    rates = learning_rates(config.mup, dims, entrywise=entrywise)
    return {parameter: rates[key] for key, parameter in parameters.items() if key in rates}


def _disable_grad_allreduce(initialised: Any, clipper: GradientClipper | None) -> None:
    """From now on the optimizer exchanges what data-parallel ranks know; DeepSpeed sums no gradients any more."""
    if hasattr(initialised, "pipeline_enable_backward_allreduce"):
        initialised.pipeline_enable_backward_allreduce = False
    else:
        initialised.enable_backward_allreduce = False
    if clipper is not None:
        clipper.grads_are_unreduced = True


def _gather_blocks_whole(model: Module) -> None:
    """Tells ZeRO 3 of blocks whose parameters are needed together; the other stages do not ask."""
    for module in model.modules():
        if isinstance(module, Block) and module.zero3_gather_together:
            set_z3_leaf_module(module, True)


def _cache_maker(config: Config, topology: Topology, layers: range) -> Callable[[int, int], KVCache]:
    """Makes caches for the blocks among the given plan indices (block i is layer i + 2)."""
    dims, size = ModelDims.of(config.model, config.moe, config.mixers), topology.model.size
    blocks = [layer - 2 for layer in layers if 2 <= layer < 2 + dims.num_layers]

    def make(batch: int, max_length: int) -> KVCache:
        max_length += dims.prompt
        keeps = {
            block: kept for block in blocks if (kept := remembered(dims, block, model_size=size, max_length=max_length))
        }
        return KVCache(
            0 if len(keeps) == len(blocks) else len(blocks),
            batch,
            dims.num_kv_heads // size,
            max_length,
            dims.head_dim,
            dtype=cache_dtype(DTYPES[require(config.precision.precision)], device(), dims.head_dim),
            device=device(),
            first_layer=blocks[0] if blocks else 0,
            states=keeps,
            prompt=dims.prompt,
        )

    return make


def _silence_deepspeed() -> None:
    """DeepSpeed speaks at every turn; its warnings are enough. It calls torch by names that torch will drop."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(max(logger.level, logging.WARNING))
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    # Its pipeline broadcasts a loss that has a gradient function; nothing goes backwards through that.
    warnings.filterwarnings("ignore", message=".*c10d::broadcast_: an autograd kernel was not registered")
