"""Rules for sparse attention, sliding windows, and blocks that share weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.block_sparsity import SPARSE_KINDS, options_of
from megatron.config.config import Config
from megatron.errors import ConfigIssue
from megatron.registry import POSITIONS, nearest_name

FIXED = {"attention": "unidirectional", "horizontal_global_attention": False}
"""Options of DeepSpeed with the only value that a causal model allows."""
LISTS = frozenset({"local_window_blocks", "global_block_indices", "global_block_end_indices"})
FROM_ZERO = frozenset({"num_random_blocks", "global_block_indices"})


def sparse_options_are_known(config: Config) -> Iterator[ConfigIssue]:
    """sparsity_config has options of the model's sparse kinds, with valid values."""
    options: Mapping[str, Any] = config.model.sparsity_config or {}
    kinds = [kind for kind in SPARSE_KINDS if kind in (config.model.attention_config or ())]
    if not options or not kinds:
        return
    known = frozenset().union(*(options_of(kind) for kind in kinds))
    for name, value in options.items():
        if name in FIXED:
            message = None if value == FIXED[name] else f"{name}: a language model sees no later token"
        elif name not in known:
            close = nearest_name(str(name), known)
            message = f"{', '.join(kinds)} has no option {name}" + (f"; did you mean {close}?" if close else "")
        else:
            message = _value_error(name, value)
        if message is not None:
            yield _error(config, message)
            return
    message = _layout_error(options, kinds)
    if message is not None:
        yield _error(config, message)


def _value_error(name: str, value: Any) -> str | None:
    """Returns the error of an option's value, or None."""
    if name == "different_layout_per_head":
        return None if isinstance(value, bool) else f"{name} is true or false"
    if name == "global_block_end_indices" and value is None:
        return None
    least = 0 if name in FROM_ZERO else 1
    if name in LISTS:
        fits = isinstance(value, (list, tuple)) and len(value) > 0 and all(_is_int_from(each, least) for each in value)
        return None if fits else f"{name} is a list of whole numbers from {least} on"
    return None if _is_int_from(value, least) else f"{name} is a whole number from {least} on"


def _is_int_from(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _layout_error(options: Mapping[str, Any], kinds: list[str]) -> str | None:
    """Returns the error of options that contradict each other, or None."""
    window, count = options.get("num_local_blocks", 4), options.get("num_global_blocks", 1)
    patterns = options.get("num_different_global_patterns", 1)
    if "sparse_fixed" in kinds:
        if window % count:
            return f"num_global_blocks = {count} does not divide num_local_blocks = {window}"
        if patterns > window // count:
            return f"num_different_global_patterns = {patterns} is more than the {window // count} patterns of a window"
        if patterns > 1 and not options.get("different_layout_per_head", False):
            return f"num_different_global_patterns = {patterns} needs different_layout_per_head: true"
    firsts, ends = options.get("global_block_indices", (0,)), options.get("global_block_end_indices")
    if ends is not None:
        if len(firsts) != len(ends):
            return "global_block_indices and global_block_end_indices are not equally long"
        if any(first >= end for first, end in zip(firsts, ends, strict=True)):
            return "global_block_end_indices: each must be above its global_block_indices"
    return None


def _error(config: Config, message: str) -> ConfigIssue:
    return ConfigIssue(message, key="sparsity_config", value=config.model.sparsity_config)


def window_holds_a_token(config: Config) -> Iterator[ConfigIssue]:
    """A token attends to itself at least."""
    width = config.model.sliding_window_width
    if width is not None and width < 1:
        yield ConfigIssue("it must be at least 1", key="sliding_window_width", value=width)


def blocks_have_their_own_weights(config: Config) -> Iterator[ConfigIssue]:
    """A checkpoint has a file for each block, so blocks cannot share weights."""
    unique = config.model.num_unique_layers
    if unique is not None and unique != config.model.num_layers:
        yield ConfigIssue(
            "blocks do not share weights: the checkpoint layout keeps a file for every block, and a pipeline would "
            "have to sum the gradients of all its stages for each of them",
            key="num_unique_layers",
            value=unique,
            hint="leave it out",
        )


def shared_positions_are_reduced_once(config: Config) -> Iterator[ConfigIssue]:
    """DeepSpeed's recomputation runs a backward pass for every group of blocks, and ZeRO reduces a gradient in each."""
    recompute = config.recompute
    names = ("partition_activations", "contiguous_checkpointing", "synchronize_each_layer", "profile_backward")
    requested = [name for name in names if getattr(recompute, name)]
    recomputes = recompute.checkpoint_activations or recompute.recompute_granularity == "full"
    positions = POSITIONS.entry(config.model.pos_emb)
    if positions.scores and requested and recomputes and config.deepspeed.zero_stage not in (0, None):
        yield ConfigIssue(
            f"pos_emb = {positions.name} has one table for all blocks, whose gradient ZeRO would reduce once for every "
            "group that DeepSpeed's recomputation repeats",
            key=requested[0],
            value=True,
            hint="leave it out, or use ZeRO stage 0",
        )
