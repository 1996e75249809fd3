"""Rules for LoRA adapters and soft prompts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.adapter_config import (
    APART,
    GATE,
    HEAD,
    SHARED_IN,
    SHARED_OUT,
    TARGETS,
    LowRank,
    low_rank,
    soft_prompt,
)
from megatron.config.config import Config
from megatron.config.derived.adapters import OF_MIXERS
from megatron.config.derived.curriculum import curriculum_lengths
from megatron.errors import ConfigIssue
from megatron.registry import REPLACING, WITHOUT_ATTENTION, WITHOUT_MLP


def one_thing_is_trained(config: Config) -> Iterator[ConfigIssue]:
    """A soft prompt is trained alone."""
    model = config.model
    if low_rank(model.lora) is not None and soft_prompt(model.soft_prompt_tuning) is not None:
        yield ConfigIssue(
            "lora trains the model's matrices, and a soft prompt is trained alone",
            key="soft_prompt_tuning",
            hint="keep one of the two",
        )


def widths_are_those_of_the_model(config: Config) -> Iterator[ConfigIssue]:
    """MuP scales learning rates of dimensions that grow with the width, which LoRA's rank and a prompt do not."""
    model = config.model
    requested = {"lora": low_rank(model.lora), "soft_prompt_tuning": soft_prompt(model.soft_prompt_tuning)}
    for key, found in requested.items():
        if config.mup.use_mup and found is not None:
            message = "muP has no learning rate for LoRA adapters and soft prompts"
            yield ConfigIssue(
                message, key=key, hint="leave use_mup out: tools/convert_to_hf.py folds it into the weights"
            )


def adapters_have_matrices(config: Config) -> Iterator[ConfigIssue]:
    """Every target is in some block."""
    model, moe = config.model, config.moe
    requested = low_rank(model.lora)
    if requested is None:
        return
    if GATE in requested.targets and not model.attention_output_gate:
        what = f"the model has no {GATE} (attention_output_gate)"
        yield ConfigIssue(what, key="lora", value=model.lora, hint="leave that target out")
    listed = list(enumerate(map(str, model.attention_config or ())))
    attends = any(kind not in WITHOUT_ATTENTION for _, kind in listed)
    fed = [number for number, kind in listed if kind not in WITHOUT_MLP]
    yield from _mixers_have_matrices(requested, {kind for _, kind in listed})
    mixed = any(moe.has_experts(number) for number in fed)
    yield from _experts_take_updates(requested, mixed)
    shared = [name for name in requested.targets if name in (SHARED_IN, SHARED_OUT)]
    if shared and not (mixed and moe.moe_shared_expert_intermediate_size):
        what = f"no block has a {shared[0]} (moe_shared_expert_intermediate_size)"
        yield ConfigIssue(what, key="lora", value=requested.block(), hint="leave shared_experts out of targets")
    usual = [name for name in requested.targets if name not in APART]
    lost = [name for name in usual if TARGETS[name][0].startswith("mlp.")]
    others = [name for name in usual if name not in lost]
    if any(kind in REPLACING for _, kind in listed):
        others = [name for name in others if name != "dense"]
    if not attends and others:
        what = f"no block has attention, so no block has a {others[0]}"
        projections = [name for name in OF_MIXERS if {kind for _, kind in listed} & OF_MIXERS[name]]
        named = [*(["dense_h_to_4h", "dense_4h_to_h"] if fed else []), *projections]
        yield ConfigIssue(what, key="lora", hint=f"write targets: [{', '.join(named)}]")
    if not fed and lost:
        what = f"no block has an MLP, so no block has a {lost[0]}"
        yield ConfigIssue(what, key="lora", hint="write targets: [query_key_value, dense]")
    elif all(moe.has_experts(number) for number in fed) and lost:
        yield ConfigIssue(
            f"every block has experts in place of its MLP, so no block has a {lost[0]}",
            key="lora",
            hint="write targets: [query_key_value, dense], and experts for updates of these",
        )


def _experts_take_updates(requested: LowRank, exist: bool) -> Iterator[ConfigIssue]:
    """Experts exist, and what peft cannot do with a parameter of three dimensions is not asked for."""
    if not requested.of_experts:
        return
    if not exist:
        hint = "leave experts out of targets"
        yield ConfigIssue("no block has experts (moe_num_experts)", key="lora", value=requested.block(), hint=hint)
    for name, given in (("dropout", requested.dropout > 0), ("dora", requested.magnitudes)):
        if given:
            yield ConfigIssue(
                f"updates of experts take no {name}: peft has none for them, since transformers holds the experts of a "
                "block in one parameter",
                key="lora",
                value=requested.block(),
                hint=f"leave {name} out, or experts out of targets",
            )


def _mixers_have_matrices(requested: LowRank, kinds: set[str]) -> Iterator[ConfigIssue]:
    for name, having in OF_MIXERS.items():
        if name in requested.targets and not kinds & having:
            what = f"no block has the target {name}, which blocks of kind {', '.join(sorted(having))} have"
            yield ConfigIssue(what, key="lora", hint="leave that target out")


def saved_modules_exist(config: Config) -> Iterator[ConfigIssue]:
    """A tied output layer has no matrix of its own to train."""
    model = config.model
    requested = low_rank(model.lora)
    if requested is not None and requested.modules_to_save == (HEAD,) and not model.no_weight_tying:
        yield ConfigIssue(
            f"modules_to_save names {HEAD} alone, and the output layer is the word embedding's matrix here, so "
            "training it trains the embedding too",
            key="lora",
            value=model.lora,
            hint="write modules_to_save: [embedding, head], or no_weight_tying: true for a model with two matrices",
        )


def prompts_leave_room(config: Config) -> Iterator[ConfigIssue]:
    """The soft prompt is a part of seq_length, and one document follows it."""
    model, data, lengths = config.model, config.data, config.deepspeed.curriculum_learning
    prompt = soft_prompt(model.soft_prompt_tuning)
    if prompt is None:
        return
    assert model.seq_length is not None
    if prompt.num_tokens >= model.seq_length:
        yield ConfigIssue(
            f"its {prompt.num_tokens} vectors leave no room for a text in seq_length = {model.seq_length}",
            key="soft_prompt_tuning",
            hint="lower num_tokens, or raise seq_length",
        )
    elif lengths and lengths.get("enabled") and _shortest(lengths, model.seq_length) <= prompt.num_tokens:
        yield ConfigIssue(
            f"the shortest sequences are not longer than a prompt of {prompt.num_tokens} vectors",
            key="curriculum_learning",
            value=lengths,
            hint="begin with longer ones, or lower num_tokens",
        )
    for name in ("reset_attention_mask", "reset_position_ids"):
        if getattr(data, name):
            yield ConfigIssue(
                "only the first document of a sample would see the soft prompt",
                key=name,
                value=True,
                hint="leave it out; with pack_impl: unpacked every sample holds one document",
            )


def _shortest(block: dict[str, object], seq_length: int) -> int:
    settings = block.get("schedule_config")
    if isinstance(settings, dict) and isinstance(settings.get("difficulty"), list):
        return min(settings["difficulty"], default=seq_length)
    try:
        return curriculum_lengths(block, seq_length)(1)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return seq_length  # another rule reports the error
