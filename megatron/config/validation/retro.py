"""Rules for language models with attention to retrieved neighbours (retro_add_retriever)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.config.config import Config
from megatron.config.derived.fill import trains
from megatron.config.derived.retro import BUILD_NEIGHBORS, GENERATE
from megatron.config.validation.dependent_model_keys import DependentKeys
from megatron.config.validation.encoder_decoder import RELATIVE, key_heads_to_cross
from megatron.config.validation.retrieval import script_name
from megatron.errors import ConfigIssue
from megatron.registry import POSITIONS, VANILLA
from megatron.retro_blocks import usual_blocks

READS = ("global", "flash")
"""Kinds of blocks that may have attention to neighbours."""


def chunks_fill_sequences(config: Config) -> Iterator[ConfigIssue]:
    """Numbers of chunks, neighbours and blocks."""
    model = config.model
    if not model.retro_add_retriever:
        return
    for name in ("chunk_length", "num_neighbors", "num_retrieved_chunks", "encoder_layers"):
        key = f"retro_{name}"
        if getattr(model, key) < 1:
            yield ConfigIssue("it must be at least 1", key=key, value=getattr(model, key))
    for name in ("hidden_dropout", "attention_dropout"):
        key = f"retro_encoder_{name}"
        if not 0 <= getattr(model, key) < 1:
            yield ConfigIssue("it must be from 0 to below 1", key=key, value=getattr(model, key))
    if model.seq_length and model.retro_chunk_length > 0 and model.seq_length % model.retro_chunk_length:
        what = f"a sequence of {model.seq_length} tokens does not divide into chunks of it"
        yield ConfigIssue(what, key="retro_chunk_length", value=model.retro_chunk_length, hint="use a divisor")
    tokens = model.retro_chunk_length * model.retro_num_retrieved_chunks
    if "embedding" in POSITIONS.entry(model.pos_emb).enters and tokens > (model.max_position_embeddings or tokens):
        what = f"a neighbour has {tokens} tokens, and there are {model.max_position_embeddings} positions"
        yield ConfigIssue(what, key="retro_num_retrieved_chunks", value=model.retro_num_retrieved_chunks)
    yield from _blocks(config)


def _blocks(config: Config) -> Iterator[ConfigIssue]:
    model, key = config.model, "retro_cross_attention_layers"
    layers = model.num_layers or 0
    given = model.retro_cross_attention_layers
    blocks = usual_blocks(layers) if given is None else given
    if not blocks:
        hint = f"name blocks from 0 to {layers - 1}"
        yield ConfigIssue(f"none of the {layers} blocks attends to neighbours", key=key, value=given, hint=hint)
    elif sorted(set(blocks)) != list(blocks) or blocks[0] < 0 or blocks[-1] >= layers:
        hint = f"give different blocks in order, from 0 to {layers - 1}"
        yield ConfigIssue("these are no blocks of the model", key=key, value=list(blocks), hint=hint)
    else:
        kinds = model.attention_config or ()
        other = sorted({str(kinds[block]) for block in blocks if block < len(kinds)} - set(READS))
        if other:
            what = f"these blocks attend to neighbours, and one of kind {other[0]} has no attention to full sequences"
            yield ConfigIssue(what, key=key, value=list(blocks), hint="name blocks of kind global or flash")


def retrieval_fits_other_parts(config: Config) -> Iterator[ConfigIssue]:
    """What a model that retrieves cannot have, each with its reason."""
    if not config.model.retro_add_retriever:
        return
    for key, value, why in _unusable(config):
        yield ConfigIssue(f"a model that attends to neighbours cannot have it: {why}", key=key, value=value)
    yield from key_heads_to_cross(config)


def _unusable(config: Config) -> Iterator[tuple[str, Any, str]]:
    yield from _unusable_parts(config)
    yield from _unusable_layouts(config)


def _unusable_parts(config: Config) -> Iterator[tuple[str, Any, str]]:
    model = config.model
    if model.lm_head != "linear":
        yield "train_impl", config.training.train_impl, "its text is predicted token by token"
    if "scores" in POSITIONS.entry(model.pos_emb).enters and model.pos_emb != RELATIVE:
        yield "pos_emb", model.pos_emb, "its biases are those of earlier tokens alone; use rotary, learned or none"
    for name in ("rope_scaling", "layer_types", "attn_logit_softcapping", "lora", "soft_prompt_tuning"):
        if getattr(model, name) is not None:
            yield name, getattr(model, name), "the encoder of neighbours has no such option"
    for name in ("multi_latent_attention", "use_qk_layernorm", "attention_output_gate"):
        if getattr(model, name):
            yield name, True, "cross attention has keys and values of plain heads"
    if model.softmax_type != VANILLA:
        yield "softmax_type", model.softmax_type, "the encoder of neighbours sums the keys alone"
    if model.norm_placement != "pre":
        yield "norm_placement", model.norm_placement, "its three norms are before attention, cross attention and MLP"
    if model.gpt_j_residual:
        yield "gpt_j_residual", True, "cross attention follows attention, and the MLP both"
    if model.mtp_num_layers:
        yield "mtp_num_layers", model.mtp_num_layers, "its modules would have no neighbours"
    if config.mup.use_mup:
        yield "use_mup", True, "muP has no rule for cross attention"
    if config.transformer_engine.layers:
        yield config.transformer_engine.layers[0], True, "Transformer Engine's layers are set up as causal"
    if config.precision.fp8 is not None:
        yield "fp8", config.precision.fp8, "products in FP8 are those of one stack"
    if config.optimizer.params.get("qk_clip_threshold") is not None:
        yield "optimizer", config.optimizer.optimizer, "qk_clip_threshold bounds the scores of one stack"


def _unusable_layouts(config: Config) -> Iterator[tuple[str, Any, str]]:
    axes, data, recompute = config.parallelism, config.data, config.recompute
    if axes.is_pipe_parallel:
        why = "its encoder is inside a block; use model_parallel_size or ZeRO (pipe_parallel_size: 0)"
        yield "pipe_parallel_size", axes.pipe_parallel_size, why
    if axes.context_parallel_size > 1:
        why = "a chunk and its neighbours are not shared out; use model_parallel_size"
        yield "context_parallel_size", axes.context_parallel_size, why
    if axes.sequence_parallel:
        yield "sequence_parallel", True, "a shard of a sequence has no whole chunks"
    if config.kernels.compile:
        yield "compile", True, "blocks have inputs of two lengths"
    if (config.deepspeed.curriculum_learning or {}).get("enabled", False):
        yield "curriculum_learning", True, "neighbours were retrieved for samples of full length"
    if recompute.checkpoint_activations and recompute.checkpoint_num_layers > 1:
        yield "checkpoint_num_layers", recompute.checkpoint_num_layers, "blocks have inputs of two kinds; use 1"
    if recompute.checkpoint_activations and recompute.recompute_method == "block":
        yield "recompute_method", "block", "blocks have inputs of two kinds; use uniform"
    for name in ("reset_attention_mask", "reset_position_ids"):
        if getattr(data, name):
            yield name, True, "a chunk may hold the end of one document and the start of the next"
    if data.valid_loss_per_set:
        yield "valid_loss_per_set", True, "neighbours are those of the samples of one validation set"
    if data.pack_impl != "packed":
        yield "pack_impl", data.pack_impl, "neighbours are those of joined documents"
    if config.checkpoint.checkpoint_validation_with_forward_pass:
        yield "checkpoint_validation_with_forward_pass", True, "the fixed input of that check has no neighbours"


def neighbors_are_stored(config: Config) -> Iterator[ConfigIssue]:
    """Training and generation read neighbours from a folder; finding them needs an encoder."""
    section, script = config.retrieval, script_name(config)
    builds = script == BUILD_NEIGHBORS
    if not config.model.retro_add_retriever:
        if builds:
            what, hint = f"{script} makes the neighbours of a model that retrieves", "set it to true"
            yield ConfigIssue(what, key="retro_add_retriever", value=False, hint=hint)
        return
    if not trains(config.launch.user_script) and script != GENERATE:
        what, hint = (
            f"{script} reads texts that have no neighbours",
            f"use {GENERATE}; training reports validation loss",
        )
        yield ConfigIssue(what, "retro_add_retriever", value=True, hint=hint)
        return
    if not section.retro_project_dir:
        yield ConfigIssue("a model that retrieves needs the folder of neighbours", key="retro_project_dir")
    if (builds or script == GENERATE) and not (section.retro_embedder and Path(section.retro_embedder).is_dir()):
        hint = "name a folder that transformers' save_pretrained wrote"
        yield ConfigIssue(f"{script} needs an encoder", "retro_embedder", section.retro_embedder, hint=hint)
    if builds and section.retro_query_num_neighbors_save < config.model.retro_num_neighbors:
        what = f"the model attends to {config.model.retro_num_neighbors}"
        yield ConfigIssue(what, "retro_query_num_neighbors_save", section.retro_query_num_neighbors_save)
    yield from _without_cache(config)


def _without_cache(config: Config) -> Iterator[ConfigIssue]:
    if config.evaluation.eval_tasks:
        what = "the texts of a task have no neighbours"
        yield ConfigIssue(what, key="eval_tasks", value=list(config.evaluation.eval_tasks), hint="leave it out")
    if script_name(config) != GENERATE:
        return
    if not config.generation.recompute:
        what = "a model that retrieves stores nothing of earlier tokens"
        yield ConfigIssue(what, key="recompute", value=False, hint="set recompute: true")
    if config.generation.text_gen_type == "precompute":
        yield ConfigIssue("it scores texts that have no neighbours", key="text_gen_type", value="precompute")


OF_RETRO: tuple[DependentKeys, ...] = (
    DependentKeys(
        (
            *(f"retro_{name}" for name in ("chunk_length", "num_neighbors", "num_retrieved_chunks", "encoder_layers")),
            *("retro_encoder_hidden_dropout", "retro_encoder_attention_dropout", "retro_cross_attention_layers"),
            "retro_project_dir",
        ),
        lambda config: config.model.retro_add_retriever,
        "retro_add_retriever is off",
    ),
    DependentKeys(
        ("retro_embedder",),
        lambda config: script_name(config) in (BUILD_NEIGHBORS, GENERATE),
        f"only tools/{BUILD_NEIGHBORS} and {GENERATE} read it",
    ),
    DependentKeys(
        ("retro_query_num_neighbors_save",),
        lambda config: script_name(config) == BUILD_NEIGHBORS,
        f"only tools/{BUILD_NEIGHBORS} reads it",
    ),
)
"""Keys that only a model with retrieval reads."""
