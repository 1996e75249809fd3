"""Rules for encoder-decoders, which predict the spans that an encoder's input lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.config.config import Config
from megatron.config.derived.encoder import CONVERSION
from megatron.config.derived.encoder_decoder import FRAME, PARTS, SPANS, usual_spans
from megatron.config.derived.fill import trains
from megatron.errors import ConfigIssue
from megatron.registry import POSITIONS, VANILLA

RELATIVE = "relative"
"""The positions of an encoder-decoder that no other model has."""
GENERATING = frozenset({"generate.py", "run_text_generation_server.py", CONVERSION})
"""Scripts without training that take an encoder-decoder."""
SHORTEST = 8
"""Tokens of the shortest text with something to leave out."""


def stacks_belong_to_spans(config: Config) -> Iterator[ConfigIssue]:
    """Two stacks and their positions are those of train_impl: t5."""
    model = config.model
    if config.training.train_impl == SPANS:
        return
    for name in (name for names in PARTS.values() for name in names):
        if getattr(model, name) is not None:
            hint = f"leave it out, or set train_impl: {SPANS}"
            yield ConfigIssue("one stack of blocks has no encoder beside it", name, getattr(model, name), hint=hint)
    if model.pos_emb == RELATIVE:
        what = "its tables are those of an encoder and a decoder"
        yield ConfigIssue(what, "pos_emb", RELATIVE, hint=f"use rpe, or set train_impl: {SPANS}")


def encoder_decoders_have_their_parts(config: Config) -> Iterator[ConfigIssue]:
    """What an encoder-decoder cannot be built with, each with its reason."""
    if config.training.train_impl != SPANS:
        return
    for key, value, why in _unusable(config):
        yield ConfigIssue(f"an encoder-decoder cannot have it: {why}", key=key, value=value)
    yield from key_heads_to_cross(config)
    model, ranks = config.model, config.parallelism.model_parallel_size
    if config.parallelism.sequence_parallel and ranks > 0:
        for name in PARTS["seq_length"]:
            length = getattr(model, name) or 0
            if length % ranks:
                hint = f"use a multiple of {ranks}"
                yield ConfigIssue(f"it does not divide into {ranks} shards", key=name, value=length, hint=hint)


def key_heads_to_cross(config: Config) -> Iterator[ConfigIssue]:
    """Tensor-parallel ranks that would share a key head of cross attention."""
    heads, ranks = config.model.num_kv_heads, config.parallelism.model_parallel_size
    if heads and ranks > 0 and heads % ranks:
        what = f"cross attention shares no key head among {ranks} tensor-parallel ranks"
        yield ConfigIssue(what, "num_kv_heads", heads, hint=f"use a multiple of {ranks}")


def _unusable(config: Config) -> Iterator[tuple[str, Any, str]]:
    model, deepspeed = config.model, config.deepspeed
    kinds = sorted(set(map(str, model.attention_config or ())) - {"global"})
    if kinds:
        yield "attention_config", kinds, "its blocks attend to full sequences, by kind global"
    if "scores" in POSITIONS.entry(model.pos_emb).enters and model.pos_emb != RELATIVE:
        yield "pos_emb", model.pos_emb, "its biases are those of earlier tokens alone; use relative, learned or rotary"
    if model.rope_scaling is not None:
        yield "rope_scaling", model.rope_scaling, "its two stacks have different lengths to scale to"
    if model.sliding_window_width is not None:
        yield "sliding_window_width", model.sliding_window_width, "a window is over earlier tokens"
    for name in ("layer_types", "attn_logit_softcapping"):
        if getattr(model, name) is not None:
            yield name, getattr(model, name), "its cross attention has no such option"
    if model.softmax_type != VANILLA:
        yield "softmax_type", model.softmax_type, "its encoder sums the keys alone"
    if model.multi_latent_attention:
        yield "multi_latent_attention", True, "its cross attention has keys and values of heads"
    if model.use_qk_layernorm:
        yield "use_qk_layernorm", True, "its cross attention has no such option"
    if model.attention_output_gate:
        yield "attention_output_gate", True, "its cross attention has no such gate"
    if model.norm_placement != "pre":
        yield "norm_placement", model.norm_placement, "its three norms are before attention, cross attention and MLP"
    if model.embedding_norm:
        yield "embedding_norm", True, "its embeddings have none"
    if model.gpt_j_residual:
        yield "gpt_j_residual", True, "cross attention follows attention, and the MLP both"
    if model.num_token_types:
        yield "num_token_types", model.num_token_types, "its samples have no segments"
    for name in ("lora", "soft_prompt_tuning"):
        if getattr(model, name) is not None:
            yield name, getattr(model, name), "adapters are trained beside a causal model"
    if config.parallelism.context_parallel_size > 1:
        why = "its two sequences are not shared out; use model_parallel_size"
        yield "context_parallel_size", config.parallelism.context_parallel_size, why
    if config.mup.use_mup:
        yield "use_mup", True, "muP has no rule for cross attention"
    if config.moe.moe_num_experts > 1:
        yield "moe_num_experts", config.moe.moe_num_experts, "its router would balance padding"
    if config.transformer_engine.layers:
        yield config.transformer_engine.layers[0], True, "Transformer Engine's layers are set up as causal"
    if config.precision.fp8 is not None:
        yield "fp8", config.precision.fp8, "products in FP8 are those of one stack"
    if config.kernels.compile:
        yield "compile", True, "blocks of two stacks have inputs of two lengths"
    if config.optimizer.params.get("qk_clip_threshold") is not None:
        yield "optimizer", config.optimizer.optimizer, "qk_clip_threshold bounds the scores of one stack"
    if (deepspeed.curriculum_learning or {}).get("enabled", False):
        yield "curriculum_learning", True, "a sample that is cut loses its decoder's part"
    if config.checkpoint.checkpoint_validation_with_forward_pass:
        yield "checkpoint_validation_with_forward_pass", True, "the fixed input of that check is one sequence"


def encoder_decoders_generate_or_train(config: Config) -> Iterator[ConfigIssue]:
    """Evaluation tasks and scores of given texts are those of a model that continues its input."""
    if config.training.train_impl != SPANS:
        return
    script, what = config.launch.user_script, "an encoder-decoder does not continue the text that it reads"
    if not trains(script) and Path(str(script)).name not in GENERATING:
        hint = "use generate.py; training reports the loss on validation data"
        yield ConfigIssue(what, key="train_impl", value=SPANS, hint=hint)
    elif config.evaluation.eval_tasks:
        yield ConfigIssue(what, key="eval_tasks", value=list(config.evaluation.eval_tasks), hint="leave it out")
    if trains(script):
        return
    if config.generation.recompute:
        what = "its text is generated from a cache: a source and what follows are two sequences"
        yield ConfigIssue(what, key="recompute", value=True, hint="leave it out")
    if config.generation.text_gen_type == "precompute":
        yield ConfigIssue(what, key="text_gen_type", value="precompute", hint="use input-file or interactive")
    if config.parallelism.pipe_parallel_size > 1:
        what = "an encoder-decoder generates on one stage, since its encoder runs once and its decoder again and again"
        hint = "set pipe_parallel_size: 1, and model_parallel_size to share it out; any layout's checkpoint is read"
        yield ConfigIssue(what, "pipe_parallel_size", config.parallelism.pipe_parallel_size, hint=hint)


def spans_can_be_cut_out(config: Config) -> Iterator[ConfigIssue]:
    """The numbers of span corruption, and room for what the decoder reads."""
    data, model = config.data, config.model
    if config.training.train_impl != SPANS:
        return
    sound = 0 < data.mask_prob < 1 and data.mask_max_ngram >= 1 and data.mask_mean_words >= 1
    if not 0 < data.mask_prob < 1:
        yield ConfigIssue("it must be above 0 and below 1", key="mask_prob", value=data.mask_prob)
    if not 0 <= data.short_seq_prob <= 1:
        yield ConfigIssue("it must be from 0 to 1", key="short_seq_prob", value=data.short_seq_prob)
    for name in ("mask_max_ngram", "mask_mean_words"):
        if getattr(data, name) < 1:
            yield ConfigIssue("it must be at least 1", key=name, value=getattr(data, name))
    if data.pack_impl != "unpacked":
        what = "samples of spans are padded, since each has two parts"
        yield ConfigIssue(what, key="pack_impl", value=data.pack_impl, hint="set pack_impl: unpacked")
    source, target = model.encoder_seq_length or 0, model.decoder_seq_length or 0
    if source and source < SHORTEST:
        yield ConfigIssue(f"a text has at least {SHORTEST} tokens", key="encoder_seq_length", value=source)
    elif source and target and sound:
        _, needed = usual_spans(data.mask_prob, source - FRAME, data.mask_max_ngram, data.mask_mean_words)
        if target < needed:
            what = f"the spans of a sample with their sentinels usually are {needed} tokens, which this would cut"
            hint = f"raise it to {needed} or more, or lower mask_prob or encoder_seq_length"
            yield ConfigIssue(what, key="decoder_seq_length", value=target, hint=hint)
    for split in ("train", "valid", "test"):
        for name in (f"{split}_label_data_paths", f"{split}_reward_data_paths"):
            if getattr(data, name) is not None:
                what = "the labels are the tokens of the spans"
                yield ConfigIssue(what, key=name, value=list(getattr(data, name)), hint="leave it out")
    if config.training.char_level_ppl:
        what = "the loss is that of spans, which make no text"
        yield ConfigIssue(what, key="char_level_ppl", value=True, hint="leave it out")
