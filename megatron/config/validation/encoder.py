"""Rules for encoders: bidirectional models, which predict masked tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.config.config import Config
from megatron.config.derived.encoder import CONVERSION, ENCODERS, MASKED
from megatron.config.derived.fill import trains
from megatron.config.derived.retrieval import RETRIEVAL_SCRIPTS
from megatron.errors import ConfigIssue
from megatron.registry import BIDIRECTIONAL, LINEAR_HEAD, POSITIONS

SHORTEST = 8
"""Tokens of the shortest sequence with two segments, their separators and something to mask."""


def masks_belong_to_objectives(config: Config) -> Iterator[ConfigIssue]:
    """A causal objective would show a bidirectional model its labels, and masked tokens need both sides."""
    model, objective = config.model, config.training.train_impl
    masked, encodes = objective == MASKED, model.attention_mask == BIDIRECTIONAL
    if encodes != (objective in ENCODERS):
        yield ConfigIssue(
            "a bidirectional model sees the tokens that train_impl: normal asks it for"
            if encodes
            else f"train_impl: {objective} asks for tokens from both sides of them",
            key="attention_mask",
            value=model.attention_mask,
            hint="leave it out: it follows from train_impl",
        )
    head = ENCODERS.get(objective, LINEAR_HEAD)
    if model.lm_head != head:
        what = f"train_impl: {objective} has the head {head}"
        yield ConfigIssue(what, key="lm_head", value=model.lm_head, hint="leave it out: it follows from train_impl")
    if model.bert_binary_head and not masked:
        what = f"the order of segments is learned with train_impl: {MASKED}"
        yield ConfigIssue(what, key="bert_binary_head", value=True, hint="leave it out")
    types = model.num_token_types or 0
    if types < 0 or (model.bert_binary_head and types < 2):
        what = "two segments need two types" if types >= 0 else "it cannot be negative"
        yield ConfigIssue(what, key="num_token_types", value=types, hint="leave it out")


def encoders_do_not_generate(config: Config) -> Iterator[ConfigIssue]:
    """Generation, evaluation tasks and the service continue a text token by token."""
    if config.model.attention_mask != BIDIRECTIONAL:
        return
    what = "a bidirectional model predicts masked tokens and does not continue a text"
    script = config.launch.user_script
    if not trains(script) and Path(str(script)).name not in (CONVERSION, *RETRIEVAL_SCRIPTS):
        hint = "load a causal model; of an encoder training reports the loss on validation data"
        yield ConfigIssue(what, key="train_impl", value=config.training.train_impl, hint=hint)
    elif config.evaluation.eval_tasks:
        yield ConfigIssue(what, key="eval_tasks", value=list(config.evaluation.eval_tasks), hint="leave it out")


def encoders_have_their_parts(config: Config) -> Iterator[ConfigIssue]:
    """What an encoder cannot be built with, each with its reason."""
    if config.model.attention_mask != BIDIRECTIONAL:
        return
    for key, value, why in _unusable(config):
        yield ConfigIssue(f"an encoder cannot have it: {why}", key=key, value=value)


def _unusable(config: Config) -> Iterator[tuple[str, Any, str]]:
    model = config.model
    kinds = sorted(set(map(str, model.attention_config or ())) - {"global"})
    if kinds:
        yield "attention_config", kinds, "its blocks attend to the full document, by kind global"
    if "scores" in POSITIONS.entry(model.pos_emb).enters:
        yield "pos_emb", model.pos_emb, "its biases of scores are those of earlier tokens; use learned or rotary"
    if model.sliding_window_width is not None:
        yield "sliding_window_width", model.sliding_window_width, "a window is over earlier tokens"
    elif any(block.sliding_window_width is not None for block in model.block_options):
        yield "layer_types", list(model.layer_types or ()), "a window is over earlier tokens"
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(model, name) is not None:
            yield name, getattr(model, name), "its attention and its head have no bounds"
    options = model.layer_type_options or {}
    if any("sliding_window_width" in own for own in options.values() if isinstance(own, Mapping)):
        yield "layer_type_options", dict(options), "a window is over earlier tokens"
    if model.attn_logit_softcapping is not None:
        yield "attn_logit_softcapping", model.attn_logit_softcapping, "its attention has no bound of scores"
    if model.final_logit_softcapping is not None:
        yield "final_logit_softcapping", model.final_logit_softcapping, "its logits have a bias and no bound"
    if model.logit_scale != 1.0:
        yield "logit_scale", model.logit_scale, "its logits have a bias, which the factor would leave out"
    if model.no_weight_tying:
        yield "no_weight_tying", True, "masked tokens are predicted by the word embedding's matrix"
    if model.lora is not None or model.soft_prompt_tuning is not None:
        name = "lora" if model.lora is not None else "soft_prompt_tuning"
        yield name, getattr(model, name), "adapters are trained beside a causal model"
    if config.parallelism.context_parallel_size > 1:
        yield (
            "context_parallel_size",
            config.parallelism.context_parallel_size,
            "a ring skips later tokens, and segments end anywhere in a sequence; use model_parallel_size",
        )
    if config.mup.use_mup:
        yield "use_mup", True, "muP has no rule for its heads"
    if config.moe.moe_num_experts > 1:
        yield "moe_num_experts", config.moe.moe_num_experts, "its router would balance padding"
    if config.transformer_engine.layers:
        yield config.transformer_engine.layers[0], True, "Transformer Engine's layers are set up as causal"
    if (config.deepspeed.curriculum_learning or {}).get("enabled", False):
        yield "curriculum_learning", True, "a sample that is cut loses its second segment"


def masked_samples_can_be_made(config: Config) -> Iterator[ConfigIssue]:
    """The numbers of masking, and what samples are made of."""
    data, model = config.data, config.model
    if config.training.train_impl != MASKED:
        return
    if not 0 < data.mask_prob < 1:
        yield ConfigIssue("it must be above 0 and below 1", key="mask_prob", value=data.mask_prob)
    if not 0 <= data.short_seq_prob <= 1:
        yield ConfigIssue("it must be from 0 to 1", key="short_seq_prob", value=data.short_seq_prob)
    if data.mask_max_ngram < 1:
        yield ConfigIssue("it must be at least 1", key="mask_max_ngram", value=data.mask_max_ngram)
    if model.seq_length is not None and model.seq_length < SHORTEST:
        yield ConfigIssue(f"a masked sample has at least {SHORTEST} tokens", key="seq_length", value=model.seq_length)
    if data.pack_impl == "packed" and model.bert_binary_head:
        yield ConfigIssue(
            "the order of segments is learned from samples of one document each, and packed samples have several",
            key="pack_impl",
            value=data.pack_impl,
            hint="set pack_impl: unpacked, or bert_binary_head: false",
        )
    if data.pack_impl not in ("packed", "unpacked"):
        hint = "use packed, which joins documents without padding, or unpacked, which pads"
        yield ConfigIssue("masked samples are not made this way", key="pack_impl", value=data.pack_impl, hint=hint)
    for split in ("train", "valid", "test"):
        for name in (f"{split}_label_data_paths", f"{split}_reward_data_paths"):
            if getattr(data, name) is not None:
                what = "the labels are the masked tokens"
                yield ConfigIssue(what, key=name, value=list(getattr(data, name)), hint="leave it out")
    if config.training.char_level_ppl:
        what = "the loss is that of masked tokens, which make no text"
        yield ConfigIssue(what, key="char_level_ppl", value=True, hint="leave it out")
